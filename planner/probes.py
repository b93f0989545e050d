"""Points of the curves that a prediction rests on, for ``run`` to time again: has the machine changed since?"""

from collections.abc import Sequence

import numpy as np

from ..spec.cluster import Cluster
from ..spec.curve import Curve
from ..spec.errors import MissingCurveError
from ..spec.model import DTYPE_BYTES, Model
from ..spec.operators import expert_shape
from ..spec.plan import ProbePoint

COMPUTE_ROWS = 128  # of each expert: enough that arithmetic limits it
MOST_BYTES = 64 << 20  # of weights: a probe stands beside a model that fills the memory
MESSAGE = 1 << 16  # bytes, about the largest whose time is not all bandwidth


def probe_points(cluster: Cluster, model: Model, dtype: str) -> tuple[ProbePoint, ...]:
    """Experts with many rows (arithmetic), with one row (reading weights), and one all-to-all where there are peers."""
    block, devices = model.moe_block(), range(len(cluster.devices))
    shape = expert_shape(block)
    curves = [cluster.operator(device, "expert_ffn", shape, dtype, model.name) for device in devices]
    if any(curve.axes != curves[0].axes for curve in curves):
        return ()
    grid = {axis.name: axis.values for axis in curves[0].axes}
    row = int(shape["matrices"]) * int(shape["hidden"]) * DTYPE_BYTES[dtype]  # bytes of one expert's column
    sizes = sorted((ffn * experts * row, int(ffn), int(experts)) for ffn in grid["ffn"] for experts in grid["experts"])
    _, ffn, experts = max((size for size in sizes if size[0] <= MOST_BYTES), default=sizes[0])
    most = {"ffn": ffn, "experts": experts}
    points = [
        _point("compute", "expert_ffn", curves, most | {"tokens": _nearest(grid["tokens"], COMPUTE_ROWS)}),
        _point("memory", "expert_ffn", curves, most | {"tokens": int(grid["tokens"][0])}),
    ]
    if len(devices) > 1:
        try:
            curve = cluster.collective("all_to_all", tuple(devices)).curve
        except MissingCurveError:
            return tuple(points)
        size = _nearest(curve.axes[0].values, MESSAGE)
        points.append(_point("exchange", "all_to_all", [curve] * len(devices), {"bytes": size}))
    return tuple(points)


def _point(kind, operator: str, curves: Sequence[Curve], at: dict[str, int]) -> ProbePoint:
    return ProbePoint(kind=kind, operator=operator, at=at, seconds=tuple(curve.at(**at).seconds for curve in curves))


def _nearest(values: Sequence[float], wanted: int) -> int:
    return int(min(values, key=lambda value: abs(np.log(value / wanted))))

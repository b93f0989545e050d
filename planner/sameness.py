"""What is alike in a cluster, under the names that the cost model asks for: kinds, link classes, hosts, collectives.

Derived from a document in which every device and every ordered pair has curves of its own: equal curves are one class.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..spec.cluster import Cluster, CollectiveCurve, Device
from ..spec.curve import Curve
from ..spec.errors import MissingCurveError
from ..spec.operators import Collective, Shape


class LinkClass(NamedTuple):
    """Ordered pairs with one latency and one curve."""

    latency: float
    curve: Curve


class Sameness:
    """kind_index, host_index: [devices] positions in ``kinds`` and in the cluster's hosts."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        names = {host.name: i for i, host in enumerate(cluster.hosts)}
        self.host_index = np.array([names[device.host] for device in cluster.devices])
        kinds: dict[tuple, int] = {}
        self.kinds: list[Device] = []
        index = []
        for device in cluster.devices:
            key = (device.kind, device.cpu_share, device.stream_bandwidth, *map(_operator_key, device.operators))
            if key not in kinds:
                kinds[key] = len(self.kinds)
                self.kinds.append(device)
            index.append(kinds[key])
        self.kind_index = np.array(index)
        self._operators = [
            {(entry.operator, entry.dtype, *sorted(entry.shape.items())): entry.curve for entry in device.operators}
            for device in self.kinds
        ]
        self._collectives: dict[tuple, CollectiveCurve] = {}
        for curve in cluster.collectives:
            if curve.traffic == "equal":
                self._collectives.setdefault((curve.collective, curve.group), curve)

    @cached_property
    def _links(self) -> tuple[np.ndarray, list[LinkClass]]:
        classes: dict[tuple, int] = {}
        found: list[LinkClass] = []
        index = np.full((len(self.host_index),) * 2, -1)
        for link in self.cluster.links:
            key = link.latency, link.curve.axes[0].values, link.curve.median
            if key not in classes:
                classes[key] = len(found)
                found.append(LinkClass(link.latency, link.curve))
            index[link.source, link.target] = classes[key]
        return index, found

    @property
    def link_classes(self) -> Sequence[LinkClass]:
        return self._links[1]

    def link_class_index(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Position in ``link_classes`` of every ordered pair, -1 for a device and itself."""
        return self._links[0][sources, targets]

    def operator(self, device: int, operator: str, shape: Shape, dtype: str, model: str, remedy: str = "") -> Curve:
        """The curve of an operator. The error names ``model``, or ends with another ``remedy`` than to measure it."""
        known = self._operators[self.kind_index[device]].get((operator, dtype, *sorted(shape.items())))
        return known or self.cluster.operator(device, operator, shape, dtype, model, remedy)

    def collective(self, collective: Collective, group: tuple[int, ...]) -> CollectiveCurve:
        known = self._collectives.get((collective, group))
        if known is None:
            raise MissingCurveError(
                f"the cluster has no {collective} curve for devices {list(group)}: measure it with `moeplan profile`"
            )
        return known


def _operator_key(entry) -> tuple:
    return (entry.operator, entry.dtype, *sorted(entry.shape.items()), entry.curve.axes, entry.curve.median)

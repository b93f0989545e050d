"""What a user asks for, by name, path or document, as the planner takes it; for the command line and the library."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..planner.place.fleet import even_fleet, uneven_fleet
from ..planner.place.request import Request
from ..spec.errors import MoeplanError
from ..spec.routing import check_shape

if TYPE_CHECKING:
    from ..planner.place.timed import Timing
    from ..spec.cluster import Cluster
    from ..spec.model import DType, Model
    from ..spec.trace import Trace
    from ..spec.workload import Workload

DEVICES, WORKLOAD = 8, "prefill:2048"  # of `place`, by default


def placement_request(
    trace: "Trace",
    *,
    devices: int | None = None,
    hosts: int | None = None,
    cluster: "Cluster | None" = None,
    model: "Model | None" = None,
    workload: "Workload | None" = None,
    dtype: "DType | None" = None,
    asked: str = "",
    slots: int | None = None,
    slots_per_device: Sequence[int] | None = None,
    equal_slots: bool = False,
    seed: int = 0,
    **rest: Any,
) -> Request:
    """The request of `moeplan place`: equal devices, unequal slots, or a measured cluster.

    rest: further fields of ``Request``. Raises MoeplanError for what does not go together.
    """
    if cluster is None:
        for option, value in {"--workload": workload, "--dtype": dtype}.items():
            if value is not None:
                raise MoeplanError(f"{option} needs --cluster: without one no time is predicted")
    held = check_slots(slots_per_device, slots, devices, equal_slots) if slots_per_device else None
    count = slots or (sum(held) if held else trace.num_experts)
    timing = None
    if cluster is not None:
        if devices or hosts:
            raise MoeplanError(f"--{'devices' if devices else 'hosts'} does not go with --cluster: they are its own")
        if held:
            raise MoeplanError("--slots-per-device does not go with --cluster: its devices' memory says how many fit")
        if model is None:
            raise MoeplanError("--cluster needs --model: predicted time depends on the experts' sizes")
        timing = _timing(cluster, model, workload, dtype, seed, asked)
        fleet = timing.devices(trace, count, equal_slots)
    elif held:
        fleet = uneven_fleet(held, hosts or 1)
    else:
        fleet = even_fleet(devices or DEVICES, hosts or 1, count, equal_slots, trace.num_experts)
    return Request(fleet, count, equal_slots=equal_slots, seed=seed, timing=timing, **rest)


def check_slots(held: Sequence[int], slots: int | None, devices: int | None, equal_slots: bool) -> list[int]:
    """Slots of each device; what else was given must agree."""
    text = ",".join(map(str, held))
    if devices is not None and devices != len(held):
        raise MoeplanError(f"--slots-per-device {text} is for {len(held)} devices, --devices says {devices}")
    if slots is not None and slots != sum(held):
        raise MoeplanError(f"--slots-per-device {text} are {sum(held)} slots, --slots says {slots}")
    if equal_slots and len(set(held)) > 1:
        raise MoeplanError(f"--slots-per-device {text} does not go with --equal-slots: they differ")
    return list(held)


def named_model(name: str | None, trace: "Trace", path: str | Path, executed: bool = False) -> "Model | None":
    """The model, which must be of the trace's shape; executed: as it is measured, where a cluster predicts times."""
    if not name:
        return None
    from ..spec.catalogue import load_model
    from ..spec.catalogue.executed import load_executed

    model = load_executed(name) if executed else load_model(name)
    check_shape(trace, model, str(path))
    return model


def _timing(
    cluster: "Cluster", model: "Model", workload: "Workload | None", dtype: "DType | None", seed: int, asked: str
) -> "Timing":
    """What predicts; imported when it is needed: predictions need much that other placements do not."""
    from ..planner.place.timed import Timing
    from ..spec.workload import Workload

    return Timing(cluster, model, workload or Workload.from_text(WORKLOAD), dtype or model.dtype, seed, asked)

"""What ``moeplan advise`` asks with: measured tables of a GPU, or a measured cluster."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..planner.place.fleet import even_fleet
from ..spec.engines import engine_name
from ..spec.errors import MoeplanError

if TYPE_CHECKING:
    from ..planner.advise.timing import Timer
    from ..spec.model import Model
    from ..spec.placement import PlacementDevice
    from ..spec.trace import Trace

TRIED = (0, 1, 2, 4)  # redundant experts of each device
DEVICES = 8


@dataclass(frozen=True)
class Source:
    """Who times, the devices, and the bytes per second at which one of them loads experts."""

    timer: "Timer"
    devices: "tuple[PlacementDevice, ...]"
    link: float


def of_tables(
    device: str, engine: str, folder: Path | None, number_format: str | None, model: "Model", ep: int | None
) -> Source:
    """Of a GPU type; its own links: between hosts where the experts do not fit one."""
    from ..planner.advise.measured import kernel_table
    from ..planner.advise.timing import TableTimer
    from ..planner.serving.lookup import TABLES
    from ..profiler.silicon.audited import open_tables

    engine = TABLES.get(engine_name(engine), engine)
    tables, count = open_tables(folder), ep or DEVICES
    sheet = tables.system(device)
    timer = TableTimer(kernel_table(tables, device, engine, model, number_format), count)
    hosts = -(-count // sheet.gpus_per_node)
    link = sheet.intra_node_bytes_per_second if hosts == 1 else sheet.inter_node_bytes_per_second
    block = model.moe_block()
    assert block.moe is not None
    return Source(timer, even_fleet(count, hosts, max(count, block.moe.num_experts), False), link)


def of_cluster(path: Path, model: "Model", asked: str, trace: "Trace", ep: int | None, seed: int) -> Source:
    """Of a measured cluster; the slowest of its links, at the largest size that was measured."""
    from ..planner.advise.timing import ClusterTimer
    from ..planner.place.timed import Timing
    from ..spec.cluster import Cluster
    from ..spec.workload import Workload

    cluster = Cluster.read(path)
    count = len(cluster.devices)
    if ep is not None and ep != count:
        raise MoeplanError(f"--ep {ep} does not go with --cluster: it has {count} devices, which all share the experts")
    if count < 2:
        raise MoeplanError(f"{path} has one device: there is nothing to balance")
    timing = Timing(cluster, model, Workload.from_text("decode:512"), model.dtype, seed, asked)
    devices = timing.devices(trace, trace.num_experts, False)
    links = [link.curve.axes[0].values[-1] / link.curve.median[-1] for link in cluster.link_classes if link.curve]
    return Source(ClusterTimer(timing), devices, float(min(links, default=0.0)))


def tried(slots: Sequence[int] | None, experts: int, devices: int) -> tuple[int, ...]:
    """Slots to try: those asked for, or none to four more a device. Raises MoeplanError where they do not divide."""
    if not slots:
        least = -(-experts // devices) * devices
        return tuple(least + more * devices for more in TRIED if (least + more * devices) // devices <= experts)
    for count in slots:
        if count % devices or count < experts:
            fitting = max(-(-count // devices), -(-experts // devices)) * devices
            raise MoeplanError(
                f"--slots {count}: engines need as many on each of {devices} devices and {experts} in all, or more: "
                f"use {fitting}"
            )
    return tuple(sorted(set(slots)))

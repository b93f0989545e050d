"""What every rank does in a profile: the same measurements in the same order as all others."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .. import __version__
from ..runtime.launch import Rank
from ..runtime.load import LoadMeter
from ..runtime.memory import keep_freed_memory
from ..spec.cluster.measurement import MeasuredDevice
from ..spec.model import DTYPE_BYTES, Model
from ..spec.operators import row_bytes
from ..spec.workload import Workload
from .collectives import Groups, Measured, group_families, kinds_over, measure_collectives, open_family
from .devices import device_name, measure_copies, memory_available, nvml_details, stream_bandwidth
from .disk import measure_disk
from .links import measure_links, measure_uplinks
from .measure import Agree, Bench, Pace, processor_clock
from .operators import TORCH_DTYPES, measure_operators
from .patience import Patience
from .sizes import message_bytes
from .tasks import tasks, tensor_degrees

# Parts of the budget; the operators have what is left.
LINKS_SHARE, COLLECTIVES_SHARE, COPIES_SHARE = 0.15, 0.3, 0.05
DISK_SHARE = 0.2  # of the budget, beyond it, where a disk is asked for
LATE_SHARE = 0.05  # of the budget, beyond it: noisy points measured again
ASKED_SECONDS = (
    60.0  # and the budget may one more size of a workload take, before which nothing else is heard of a rank
)
PATIENCE_SHARE = 0.4  # of the budget, beyond it: waiting for other programs


class Progress:
    """Events about the steps of a profile; ``of``: how many there are."""

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        self._emit, self._next, self.of = emit, 0, 0

    def step(self, what: str) -> None:
        """The next one begins."""
        self._emit({"done": self._next, "of": self.of, "what": what})
        self._next += 1

    def say(self, what: str) -> None:
        """What this step waits for."""
        self._emit({"done": self._next - 1, "of": self.of, "what": what})


def agreement(device: torch.device) -> Agree:
    """The largest value of all ranks."""

    def agree(value: float) -> float:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return float(shared)

    return agree


def open_bench(rank: Rank, agree: Agree, meter: LoadMeter, patience: float, say: Callable[[str], None]) -> Bench:
    """The place to measure at; all ranks together. ``patience``: seconds to wait for other programs in all."""
    hosts, on_cpu = tuple(rank.hosts), rank.device.type == "cpu"
    memory = memory_available(rank.device, hosts.count(hosts[rank.rank]))
    shared = agree(float(shares_cores(rank, meter.quota()))) > 0
    alone = on_cpu and not shared
    return Bench(
        rank.rank,
        hosts,
        rank.device,
        agree,
        Pace.of(shared),
        available=int(-agree(-memory)),
        own=memory,
        clock=processor_clock(rank.threads) if alone else time.perf_counter,
        patience=Patience(meter, agree, patience if alone else 0.0, say),
        shared=shared,
    )


@torch.inference_mode()
def measure(rank: Rank, job: dict[str, Any]) -> dict[str, Any]:
    """Entry point of a rank. job: ``models`` (documents), ``dtypes`` (one for each), ``seconds`` (the budget),
    ``workloads`` (documents, whose sizes are measured too), ``offload`` (a folder on a disk to measure, or None).

    Returns this rank's ``device``, ``links``, ``collectives``, ``uplinks``, ``versions``, ``load``, the seconds
    ``waited`` for other programs, the number of points that they ``disturbed`` all the same, and what was ``lacking``
    of the workloads, as JSON.
    """
    started = time.perf_counter()
    keep_freed_memory()
    models = [Model.model_validate(body) for body in job["models"]]
    workloads = [Workload.model_validate(body) for body in job["workloads"]]
    dtypes, hosts = list(job["dtypes"]), tuple(rank.hosts)
    agree = agreement(rank.device)
    agree(0.0)
    meter = LoadMeter()
    progress = Progress(rank.emit)
    bench = open_bench(rank, agree, meter, PATIENCE_SHARE * job["seconds"], progress.say)
    degrees = sorted({t for model in models for t in tensor_degrees(model, hosts)})
    families = group_families(hosts, degrees)
    on_gpu = rank.device.type == "cuda"
    work = tasks(models, dtypes, hosts, offload=on_gpu or job["offload"] is not None, hosted=on_gpu)
    progress.of = 4 + (job["offload"] is not None) + len(families) + 2 * len(work)

    progress.step("memory bandwidth")
    bandwidth = stream_bandwidth(bench)
    copies = measure_copies(bench, COPIES_SHARE * job["seconds"])
    disk, beside = None, 0.0
    if job["offload"] is not None:
        progress.step("disk")
        disk, beside = measure_disk(bench, job["offload"], DISK_SHARE * job["seconds"])
    progress.step("links")
    links = measure_links(bench, LINKS_SHARE * job["seconds"])
    progress.step("uplinks")
    uplinks = measure_uplinks(bench)
    collectives: list[Measured] = []
    for groups, seconds in family_seconds(families, hosts, COLLECTIVES_SHARE * job["seconds"]):
        progress.step(f"collectives over {len(groups[0])} devices")
        family, dtype = open_family(groups, rank.rank, bench.world), TORCH_DTYPES[dtypes[0]]
        gathered = gathered_bytes(models, dtypes, bench.world) if len(groups[0]) == bench.world else 0
        message = sent_bytes(models, dtypes, workloads, bench.world)
        collectives += measure_collectives(family, bench, dtype, seconds, gathered, message)

    def left() -> float:
        return job["seconds"] + beside + bench.patience.waited - agree(time.perf_counter() - started)

    late = LATE_SHARE * job["seconds"]
    growths, most = [c.growth for c in collectives], job["seconds"] + ASKED_SECONDS
    operators, lacking = measure_operators(work, bench, left, progress.step, growths, late, workloads, most)
    progress.step("done")

    device = MeasuredDevice(
        host=hosts[rank.rank],
        kind="cuda" if rank.device.type == "cuda" else "cpu",
        name=device_name(rank.device),
        memory_bytes=bench.own,
        threads=rank.threads,
        cpu_share=rank.cpu_share,
        stream_bandwidth=bandwidth,
        operators=tuple(operators),
        copies=copies,
        disk=disk,
        details=nvml_details(rank.device),
    )
    return {
        "device": device.model_dump(mode="json"),
        "links": [timing.link.model_dump(mode="json") for timing in links],
        "collectives": [c.result() for c in collectives if c.family.own is not None],
        "uplinks": uplinks,
        "load": meter.whole().model_dump(mode="json"),
        "waited": bench.patience.waited,
        "lacking": lacking,
        "disturbed": disturbed_points(collectives) | {"links": sum(timing.disturbed for timing in links)},
        "versions": versions(rank.device),
    }


def family_seconds(families: Sequence[Groups], hosts: Sequence[str], seconds: float) -> list[tuple[Groups, float]]:
    """Each family with its part of the seconds."""
    weights = [sum(weight for *_, weight in kinds_over(groups, hosts)) for groups in families]
    return [(groups, seconds * weight / sum(weights)) for groups, weight in zip(families, weights, strict=True)]


def disturbed_points(collectives: Sequence[Measured]) -> dict[str, int]:
    """Points of each collective that other programs never left alone for long enough."""
    counts: dict[str, int] = {}
    for one in collectives:
        alone = one.family.own is None
        counts[one.name] = counts.get(one.name, 0) + (0 if alone else one.disturbed)
    return counts


def shares_cores(rank: Rank, quota: float | None) -> bool:
    """Whether this rank has less than its cores by design: ranks that share them, a lab's share, a cgroup's quota."""
    if rank.device.type != "cpu":
        return False
    peers = rank.hosts.count(rank.hosts[rank.rank])
    return rank.cpu_share < rank.threads or (quota is not None and quota < peers * rank.threads)


def gathered_bytes(models: Sequence[Model], dtypes: Sequence[str], world: int) -> int:
    """The most that one of ``world`` devices contributes when the experts of a layer are gathered."""
    return max(
        block.moe.num_experts * model.computed_expert_bytes(ordinal, dtype) // world // 8 * 8
        for model, dtype in zip(models, dtypes, strict=True)
        for ordinal, index in enumerate(model.moe_layers)
        if (block := model.layers[index]).moe
    )


def sent_bytes(models: Sequence[Model], dtypes: Sequence[str], workloads: Sequence[Workload], world: int) -> int:
    """The largest message of these workloads' steps; 0 without any."""
    return max(
        (
            message_bytes(workload, world, row_bytes(model.moe_block(), DTYPE_BYTES[dtype])) // 8 * 8
            for model, dtype in zip(models, dtypes, strict=True)
            for workload in workloads
        ),
        default=0,
    )


def versions(device: torch.device) -> dict[str, str]:
    """What a measurement depends on."""
    found = {
        "moeplan": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "linux": os.uname().release,
    }
    if device.type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found

"""What every rank does in a profile: the same measurements in the same order as all others."""

import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist

from ..runtime.launch import Rank
from ..spec.cluster import Device
from ..spec.model import Model
from .collectives import group_families, measure_collectives, open_family
from .devices import device_name, measure_copies, memory_available, nvml_details, stream_bandwidth
from .links import measure_links, measure_uplinks
from .measure import Agree, Bench, Pace
from .operators import TORCH_DTYPES, measure_operators, tasks, tensor_degrees

# Parts of the budget; the operators have what is left.
LINKS_SHARE, COLLECTIVES_SHARE, COPIES_SHARE = 0.15, 0.3, 0.05


def agreement(device: torch.device) -> Agree:
    """The largest value of all ranks."""

    def agree(value: float) -> float:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return float(shared)

    return agree


@torch.inference_mode()
def measure(rank: Rank, job: dict[str, Any]) -> dict[str, Any]:
    """Entry point of a rank. job: ``models`` (documents), ``dtypes`` (one for each), ``seconds`` (the budget).

    Returns this rank's ``device``, ``links``, ``collectives``, ``uplinks`` and ``versions`` as JSON.
    """
    started = time.perf_counter()
    models = [Model.model_validate(body) for body in job["models"]]
    dtypes, hosts = list(job["dtypes"]), tuple(rank.hosts)
    agree = agreement(rank.device)
    agree(0.0)
    memory = memory_available(rank.device, hosts.count(hosts[rank.rank]))
    throttled = rank.device.type == "cpu" and rank.cpu_share < rank.threads
    pace = Pace.of(agree(float(throttled)) > 0)
    bench = Bench(rank.rank, hosts, rank.device, agree, pace, available=int(-agree(-memory)))

    degrees = sorted({t for model in models for t in tensor_degrees(model, hosts)})
    families = group_families(hosts, degrees)
    work = tasks(models, dtypes, hosts)
    steps, step = 3 + len(families) + 2 * len(work), 0

    def next_step(what: str) -> None:
        nonlocal step
        rank.emit({"done": step, "of": steps, "what": what})
        step += 1

    next_step("memory bandwidth")
    bandwidth = stream_bandwidth(bench)
    copies = measure_copies(bench, COPIES_SHARE * job["seconds"])
    next_step("links")
    links = measure_links(bench, LINKS_SHARE * job["seconds"])
    next_step("uplinks")
    uplinks = measure_uplinks(bench)
    collectives = []
    for groups in families:
        next_step(f"collectives over {len(groups[0])} devices")
        family = open_family(groups, rank.rank, bench.world)
        allowance = COLLECTIVES_SHARE * job["seconds"] / len(families)
        gathered = gathered_bytes(models, dtypes, bench.world) if len(groups[0]) == bench.world else 0
        collectives += measure_collectives(family, bench, TORCH_DTYPES[dtypes[0]], allowance, gathered)
    operators = measure_operators(work, bench, lambda: job["seconds"] - agree(time.perf_counter() - started), next_step)
    next_step("done")

    device = Device(
        host=hosts[rank.rank],
        kind="cuda" if rank.device.type == "cuda" else "cpu",
        name=device_name(rank.device),
        memory_bytes=memory,
        threads=rank.threads,
        cpu_share=rank.cpu_share,
        stream_bandwidth=bandwidth,
        operators=tuple(operators),
        copies=copies,
        details=nvml_details(rank.device),
    )
    return {
        "device": device.model_dump(mode="json"),
        "links": [link.model_dump(mode="json") for link in links],
        "collectives": [
            c | {"curve": c["curve"].model_dump(mode="json"), "busy": c["busy"].model_dump(mode="json")}
            for c in collectives
        ],
        "uplinks": uplinks,
        "versions": versions(rank.device),
    }


def gathered_bytes(models: Sequence[Model], dtypes: Sequence[str], world: int) -> int:
    """The most that one of ``world`` devices contributes when the experts of a layer are gathered."""
    return max(
        block.moe.num_experts * model.computed_expert_bytes(ordinal, dtype) // world // 8 * 8
        for model, dtype in zip(models, dtypes, strict=True)
        for ordinal, index in enumerate(model.moe_layers)
        if (block := model.layers[index]).moe
    )


def versions(device: torch.device) -> dict[str, str]:
    """What a measurement depends on."""
    found = {
        "moeplan": version("moeplan"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "linux": os.uname().release,
    }
    if device.type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found

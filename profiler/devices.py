"""Facts about one device: name, memory available, memory bandwidth, and for GPUs what NVML knows."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from ..spec.cluster import Copies
from ..spec.curve import Curve
from ..spec.errors import MoeplanError
from .grids import SIZES, Coordinates, Point, grow
from .measure import Bench, measure, timer

STREAM_BYTES = 256 * 2**20  # far larger than any cache


def check_device(kind: str) -> None:
    """A clear error when this machine has not got the GPUs that were asked for."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise MoeplanError(
            "device cuda: torch finds no NVIDIA GPU here; use --device cpu, or install a CUDA build of torch"
        )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return os.uname().machine


def memory_available(device: torch.device, ranks_on_host: int) -> int:
    """Bytes that this rank may still use: free on its GPU, or its part of what the host and its cgroups leave."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return host_memory() // ranks_on_host


def host_memory(proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> int:
    """Bytes available on this host: MemAvailable, or less where a cgroup (v1 or v2) of this process has a limit."""
    available = [int(line.split()[1]) * 1024 for line in _lines(f"{proc}/meminfo") if line.startswith("MemAvailable:")]
    for line in _lines(f"{proc}/self/cgroup"):
        _, controllers, path = line.strip().split(":", 2)
        if controllers == "":
            root, names = Path(cgroups), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = Path(cgroups) / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.strip("/")
        available += [
            r
            for f in (folder, *folder.parents)
            if f.is_relative_to(root) and (r := _cgroup_available(f, *names)) is not None
        ]
    if not available:
        raise MoeplanError(f"{proc}/meminfo: no MemAvailable line; moeplan profiles Linux hosts only")
    return max(min(available), 1)


def _cgroup_available(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """Limit minus usage, page cache that can be dropped not counted; None without a limit."""
    limits, used = _lines(folder / limit), _lines(folder / usage)
    if not limits or not used or not limits[0].strip().isdigit():
        return None
    cache = [int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.split()[0] == reclaimable]
    return int(limits[0]) - int(used[0]) + sum(cache)


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def stream_bandwidth(bench: Bench) -> float:
    """Bytes per second that this device reads while all ranks read."""
    size = min(STREAM_BYTES, bench.available // 8)
    data = torch.ones(max(size // 4, 1), dtype=torch.float32, device=bench.device)
    return data.nbytes / measure(timer([data.sum], bench.device, bench.clock), bench.agree, bench.pace).median


def measure_copies(bench: Bench, allowance: float) -> Copies | None:
    """Copies between pinned host memory and a GPU; None for a processor, which needs none."""
    if bench.device.type != "cuda":
        return None

    def curve(to_device: bool) -> Curve:
        def visit(point: Coordinates) -> Point:
            host = torch.empty(point["bytes"], dtype=torch.uint8, pin_memory=True)
            here = torch.empty(point["bytes"], dtype=torch.uint8, device=bench.device)
            source, target = (host, here) if to_device else (here, host)
            run = timer([lambda: target.copy_(source, non_blocking=True)], bench.device)
            timing = measure(run, bench.agree, bench.pace)
            return Point(timing, bench.agree(timing.median), 0.0)

        return grow(SIZES, visit, bench.pace, allowance / 2)

    return Copies(to_device=curve(True), to_host=curve(False))


def nvml_details(device: torch.device) -> dict[str, str]:
    """Driver, clocks, power limit, PCIe, NVLink, NUMA node and topology of a GPU; empty for a processor."""
    if device.type != "cuda":
        return {}
    import pynvml as nvml

    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return {"nvml": f"not available: {error}"}  # a container without the driver's management library
    try:
        # NVML numbers all GPUs of the host, torch only the visible ones: the UUID is common to both.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
        questions: dict[str, Callable[[], object]] = {
            "uuid": lambda: uuid,
            "driver": nvml.nvmlSystemGetDriverVersion,
            "memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
            "sm_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
            "memory_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM),
            "power_limit_mw": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle),
            "pci_bus": lambda: nvml.nvmlDeviceGetPciInfo(handle).busId,
            "pcie_generation": lambda: nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
            "pcie_width": lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
            "numa_node": lambda: nvml.nvmlDeviceGetNumaNodeId(handle),
            "nvlinks": lambda: _nvlinks(handle),
            "topology": lambda: _topology(handle),
        }
        details = {}
        for name, ask in questions.items():
            try:
                value = ask()
            except nvml.NVMLError:
                continue  # this GPU or driver does not tell
            details[name] = value.decode() if isinstance(value, bytes) else str(value)
        return details
    finally:
        nvml.nvmlShutdown()


def _nvlinks(handle: object) -> int:
    """Active NVLink links of a GPU; NVML raises at the first number beyond those that it has."""
    import pynvml as nvml

    active = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            active += nvml.nvmlDeviceGetNvLinkState(handle, link) == nvml.NVML_FEATURE_ENABLED
        except nvml.NVMLError:
            break
    return active


def _topology(handle: object) -> str:
    """What lies between this GPU and each other of its host, in the terms of ``nvidia-smi topo``."""
    import pynvml as nvml

    names = {
        nvml.NVML_TOPOLOGY_INTERNAL: "same board",
        nvml.NVML_TOPOLOGY_SINGLE: "PIX",
        nvml.NVML_TOPOLOGY_MULTIPLE: "PXB",
        nvml.NVML_TOPOLOGY_HOSTBRIDGE: "PHB",
        nvml.NVML_TOPOLOGY_NODE: "NODE",
        nvml.NVML_TOPOLOGY_SYSTEM: "SYS",
    }
    own = nvml.nvmlDeviceGetIndex(handle)
    others = [i for i in range(nvml.nvmlDeviceGetCount()) if i != own]
    levels = [(i, nvml.nvmlDeviceGetTopologyCommonAncestor(handle, nvml.nvmlDeviceGetHandleByIndex(i))) for i in others]
    return ", ".join(f"gpu{i}: {names.get(level, level)}" for i, level in levels)

"""Memory that a rank's device holds."""

import contextlib
from pathlib import Path

import torch

STATUS, MEMORY = Path("/proc/self/status"), Path("/proc/meminfo")


class PeakMemory:
    """Bytes that this rank's device held at most since construction (CPU: this process's, from Linux's accounts)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError):  # where it is not allowed, the peak since the process began counts
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self._before = _field(STATUS, "VmRSS")

    def bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(0, _field(STATUS, "VmHWM") - self._before)


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _field(MEMORY, "MemAvailable")


def _field(file: Path, name: str) -> int:
    line = next(line for line in file.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10

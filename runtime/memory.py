"""Memory that a rank's device holds."""

import contextlib
import ctypes
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


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGEST_KEPT = 32 << 20  # bytes: glibc takes no larger threshold


RETURNED = 1 << 20  # bytes of an allocation that glibc gives back at once


def return_freed_memory() -> None:
    """Ask glibc to give large allocations back to the system as soon as they are freed, as before a step.

    By itself it learns from what is freed to keep it: what loading needs for one expert after the other was held beside
    the weights (lab-moe, 150 MiB a device: 231 MiB after loading, 141 of them in use).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, RETURNED)
        mallopt(M_TRIM_THRESHOLD, RETURNED)


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed for the next allocation, instead of giving it back to the system.

    Given back, the pages of a step's buffers are made and cleared anew in every step: with 4,096 tokens of tiny-moe on
    2 ranks a step that gathers took 277 ms, and 206 ms without. A timed call in a loop rarely pays for that, so a
    prediction was too fast. Other C libraries have no such switch, and are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)

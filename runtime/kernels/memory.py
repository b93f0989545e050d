"""Memory for what is as large as a layer's experts: gradients of weights, and what a step keeps for its backward.

The allocator hands out fresh pages for each of them at every step, which the system clears before the kernel writes
them. Here a mapping is used again once its tensor is gone; until then the system may take its pages (MADV_FREE), so
nothing is withheld from others. Idle experts' parts are zero without being written: what was there goes back to the
system, and fresh pages are zero. Pages are large ones.

Writing 600 MiB with two threads: 3.1 GB/s into the allocator's pages, 7.6 into fresh large ones, 13.7 into pages that
are there; with stores that pass the caches by, as the C++ kernels have them, 5.5 and 28.
"""

import ctypes
import mmap
import weakref
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ...spec import MoeplanError

LARGE = 32 * 2**20  # bytes; below, the allocator reuses memory that is mapped already
HUGE_PAGE = 2 * 2**20


class GradientBuffer(NamedTuple):
    """For a gradient. ``mapped``: most of what will be written has its pages already."""

    tensor: Tensor
    mapped: bool


class _Pages:
    """A mapping, zero where nobody wrote; ``written``: its last owner's experts, of ``part`` bytes each."""

    def __init__(self, size: int) -> None:
        try:
            self.map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            wanted = f"{size / 2**30:.1f} GiB for gradients or saved projections"
            raise MoeplanError(f"kernels: out of memory: expected {wanted}, got: {error}; use fewer tokens") from None
        self.fresh, self.part, self.written = True, size, set[int]()
        self._advise("MADV_HUGEPAGE", 0, size)

    def lease(self) -> "ctypes.Array[ctypes.c_char]":
        """The bytes, for one owner: when they are gone the mapping waits for the next one."""
        data = (ctypes.c_char * len(self.map)).from_buffer(self.map)
        weakref.finalize(data, self._back).atexit = False
        return data

    def _back(self) -> None:
        self.fresh = False
        self._advise("MADV_FREE", 0, len(self.map))
        _free[len(self.map)].append(self)

    def clear(self, start: int, end: int, keep_first: bool, keep_last: bool) -> None:
        """Pages go back to the system, which gives zeros for them; what is to be kept keeps the page that it shares.

        Writing half a page takes less time than a fresh one if the page is there, and longer if it is not.
        """
        first = _up(start) if keep_first else _down(start)
        last = _down(end) if keep_last else _up(end)
        if first >= last or not self._advise("MADV_DONTNEED", first, last - first):
            first = last = end
        data = torch.frombuffer(self.map, dtype=torch.uint8)
        data[start:first].zero_()
        data[last:end].zero_()

    def _advise(self, what: str, start: int, length: int) -> bool:
        """False on a system that does not take it."""
        try:
            self.map.madvise(getattr(mmap, what), start, length)
        except (AttributeError, OSError):
            return False
        return True


# Mappings that nobody uses, by size. Taking and giving back are single steps of a deque: no lock, since a tensor may
# die at any point of any thread.
_free: defaultdict[int, deque[_Pages]] = defaultdict(deque)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Anything, contiguous, each call's in memory of its own. Raises MoeplanError where there is none."""
    count = prod(shape)
    size = count * dtype.itemsize
    if device.type != "cpu" or size < LARGE:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    # It grows with the tokens, whose number changes: few sizes, or every number would leave a mapping behind.
    step = 1 << (size.bit_length() - 3)
    return torch.frombuffer(_take(-(-size // step) * step).lease(), dtype=dtype, count=count).view(tuple(shape))


def gradient(shape: Sequence[int], dtype: torch.dtype, device: torch.device, experts: Iterable[int]) -> GradientBuffer:
    """For a gradient [E, ...], contiguous, each call's in memory of its own: anything for ``experts``, which the caller
    writes, zeros for all others. Raises MoeplanError where there is none."""
    size, busy = prod(shape) * dtype.itemsize, set(experts)
    if device.type != "cpu" or size < LARGE:
        return GradientBuffer(torch.zeros(tuple(shape), dtype=dtype, device=device), False)
    pages, part, idle_from = _take(size), size // shape[0], 0
    there = busy & pages.written if pages.part == part else set()
    if not pages.fresh:
        for e in [*sorted(busy), shape[0]]:
            if e > idle_from:
                pages.clear(idle_from * part, e * part, idle_from - 1 in there, e in there)
            idle_from = e + 1
    pages.part, pages.written = part, busy
    return GradientBuffer(torch.frombuffer(pages.lease(), dtype=dtype).view(tuple(shape)), 2 * len(there) > len(busy))


def _take(size: int) -> _Pages:
    try:
        return _free[size].pop()
    except IndexError:
        return _Pages(size)


def _down(offset: int) -> int:
    return offset // HUGE_PAGE * HUGE_PAGE


def _up(offset: int) -> int:
    return -(-offset // HUGE_PAGE) * HUGE_PAGE

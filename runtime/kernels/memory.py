"""Memory for the gradients of weights: zero from the start, and nothing is spent where it stays so.

A layer's gradient is as large as its experts, and the allocator hands out fresh pages for it at every step. Large pages
of an anonymous mapping are zero without being written, so idle experts cost no time and no memory until somebody writes
to theirs; and the others' pages come 512 at a time. 600 MiB on one core: 0.57 s to clear what `torch.empty` gives,
0.36 s to write all of this, 0.03 s to read it untouched.
"""

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

LARGE = 32 * 2**20  # bytes; below, the allocator reuses memory that is mapped already


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of this shape, contiguous, each call's in memory of its own."""
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))

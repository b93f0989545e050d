"""The re-index vector (HEXA-MoE): the choices in the order of their experts, each expert's part rounded up to the tile.

Built on the device in two launches and never read by the host: its length is bounded by the sizes alone, and programs
whose tile has no expert leave at once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on
from .tiles import VARYING

BLOCK = 1024


@dataclass(frozen=True)
class Index:
    """order: [tiles height] int32, numbers of choices or -1; tile_expert: [tiles] int32, -1 for a tile not needed;
    start: [E] int32, where an expert's part of ``order`` begins; count: [E] int32, its choices."""

    order: Tensor
    tile_expert: Tensor
    start: Tensor
    count: Tensor
    tiles: int
    height: int
    experts: int


def most_tiles(choices: int, experts: int, height: int) -> int:
    """Tiles that suffice however ``choices`` fall: every expert at work wastes less than one tile."""
    busy = min(choices, experts)
    return busy + (choices - busy) // height if busy else 0


def reindex(ids: Tensor, experts: int, height: int, report: Tensor) -> Index:
    """ids: [T, K] int32 or int64 -> Index with tiles of ``height`` rows.

    An id outside -1..E-1 gets no place, and is written to ``report`` (see ``reports``) with E.
    """
    choices = ids.numel()
    tiles = most_tiles(choices, experts, height)
    # One allocation, as launches are short enough for each to count; every part begins at a multiple of 16 bytes.
    sizes = (tiles * height, tiles, experts, experts)
    padded = [-(-size // 4) * 4 for size in sizes]
    parts = ids.new_empty(sum(padded), dtype=torch.int32).split(padded)
    order, tile_expert, start, count = (part[:size] for part, size in zip(parts, sizes, strict=True))
    with on(ids.device):
        count_kernel[(experts + 1,)](ids, count, report, choices, experts, BLOCK=BLOCK)
        if experts:
            place_kernel[(experts,)](
                ids, count, order, tile_expert, start, choices, tiles,
                experts, HEIGHT=height, BLOCK=BLOCK, EXPERTS=triton.next_power_of_2(experts),
            )  # fmt: skip
    return Index(order, tile_expert, start, count, tiles, height, experts)


@triton.jit(do_not_specialize=VARYING)
def count_kernel(ids, count, report, choices, experts, BLOCK: tl.constexpr):
    """One program an expert; the last one looks for ids that are none."""
    expert = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    if expert < experts:
        total = tl.zeros((BLOCK,), tl.int32)
        for begin in range(0, choices, BLOCK):
            id = tl.load(ids + begin + place, mask=begin + place < choices, other=-1)
            total += (id == expert).to(tl.int32)
        tl.store(count + expert, tl.sum(total))
    else:
        highest = tl.full((BLOCK,), -1, tl.int64)
        lowest = tl.full((BLOCK,), -1, tl.int64)
        for begin in range(0, choices, BLOCK):
            id = tl.load(ids + begin + place, mask=begin + place < choices, other=-1).to(tl.int64)
            highest = tl.maximum(highest, id)
            lowest = tl.minimum(lowest, id)
        most = tl.max(highest)
        least = tl.min(lowest)
        if (most >= experts) | (least < -1):
            tl.store(report + 1, experts)
            tl.store(report, tl.where(least < -1, least, most))


@triton.jit(do_not_specialize=VARYING)
def place_kernel(
    ids, count, order, tile_expert, start, choices, tiles, experts,
    HEIGHT: tl.constexpr, BLOCK: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """One program an expert: its first tile from everyone's counts, then its choices in order, then padding."""
    expert = tl.program_id(0)
    every = tl.arange(0, EXPERTS)
    counts = tl.load(count + every, mask=every < experts, other=0)
    needed = (counts + HEIGHT - 1) // HEIGHT
    first = tl.sum(tl.where(every < expert, needed, 0))
    own = tl.sum(tl.where(every == expert, needed, 0))
    tl.store(start + expert, first * HEIGHT)
    place = tl.arange(0, BLOCK)
    filled = first * HEIGHT
    for begin in range(0, choices, BLOCK):
        id = tl.load(ids + begin + place, mask=begin + place < choices, other=-1)
        here = (id == expert).to(tl.int32)
        tl.store(order + filled + tl.cumsum(here, 0) - 1, begin + place, mask=here > 0)
        filled += tl.sum(here)
    for begin in range(filled, (first + own) * HEIGHT, BLOCK):
        tl.store(order + begin + place, -1, mask=begin + place < (first + own) * HEIGHT)
    for begin in range(first, first + own, BLOCK):
        tl.store(tile_expert + begin + place, expert, mask=begin + place < first + own)
    if expert == experts - 1:
        for begin in range(first + own, tiles, BLOCK):
            tl.store(tile_expert + begin + place, -1, mask=begin + place < tiles)

"""Tiles, warps and pipeline depths that a launch may take.

The defaults come first in each list. They follow from the tile's height, that is the mean rows of an expert: few rows
stream weights (deep stages, narrow blocks so that every processor has some), many rows want a square tile. They are
chosen so that they compile without spills for sm_80 and sm_90 (``compiled``); ``tuning`` measures the others.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .device import interpreting

HEIGHTS = (16, 32, 64, 128)
MOST_SPLITS = 16
WIDENED = "widened"


@dataclass(frozen=True)
class Config:
    """One launch. rows: of a tile of a weight's gradient; columns: of every tile (of each matrix for the first
    projection); depth: elements summed per step; split: parts of the sum, each with its own programs."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    split: int = 1


# (rows, columns, depth, warps, stages) by tile height, for types of 16 bits; rows counts for "esfk" alone.
_NARROW: dict[str, dict[int, list[tuple[int, int, int, int, int]]]] = {
    "esmm": {
        16: [(16, 64, 128, 4, 4), (16, 128, 64, 4, 4), (16, 32, 256, 4, 3)],
        32: [(32, 64, 128, 4, 4), (32, 128, 64, 4, 4)],
        64: [(64, 128, 64, 4, 4), (64, 256, 64, 8, 3), (64, 128, 64, 8, 3)],
        128: [(128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (128, 64, 64, 4, 4)],
    },
    "project": {
        16: [(16, 32, 128, 4, 4), (16, 64, 64, 4, 4), (16, 64, 128, 4, 3)],
        32: [(32, 32, 128, 4, 4), (32, 64, 64, 4, 4)],
        64: [(64, 64, 64, 4, 4), (64, 64, 64, 8, 3)],
        128: [(128, 64, 64, 8, 3), (128, 64, 32, 8, 4)],
    },
    "esfk": {
        16: [(64, 64, 64, 4, 4), (128, 128, 32, 8, 4)],
        32: [(64, 128, 64, 4, 4), (128, 128, 32, 8, 4)],
        64: [(128, 128, 64, 8, 3), (64, 128, 64, 4, 4)],
        128: [(128, 128, 64, 8, 3), (128, 128, 32, 8, 4)],
    },
}
# The same for float32, whose three passes of TF32 hold both parts of each operand in registers.
_WIDE: dict[str, dict[int, list[tuple[int, int, int, int, int]]]] = {
    "esmm": {
        16: [(16, 64, 64, 4, 4), (16, 128, 32, 4, 4)],
        32: [(32, 64, 64, 4, 4), (32, 128, 32, 4, 4)],
        64: [(64, 64, 32, 4, 4), (64, 128, 32, 8, 4)],
        128: [(128, 64, 32, 8, 4), (128, 64, 32, 8, 3)],
    },
    "project": {
        16: [(16, 32, 64, 4, 4), (16, 64, 32, 4, 4)],
        32: [(32, 32, 32, 4, 4), (32, 64, 32, 4, 4)],
        64: [(64, 32, 32, 8, 4), (64, 32, 32, 4, 4)],
        128: [(128, 32, 32, 8, 4), (128, 32, 16, 8, 4)],
    },
    "esfk": {
        16: [(64, 64, 32, 4, 4)],
        32: [(64, 64, 32, 4, 4), (64, 128, 32, 8, 4)],
        64: [(64, 64, 32, 4, 4), (64, 128, 32, 8, 4)],
        128: [(128, 64, 32, 8, 4), (128, 64, 32, 8, 3)],
    },
}
# From sm_90 on, whose products read both operands from shared memory: on sm_80 these would spill.
_HOPPER: dict[str, dict[int, list[tuple[int, int, int, int, int]]]] = {
    "esmm": {128: [(128, 256, 64, 8, 3)]},
    "project": {64: [(64, 128, 64, 8, 3)], 128: [(128, 128, 64, 16, 3)]},
    "esfk": {128: [(128, 256, 64, 8, 3)]},
}


def height(choices: int, experts: int) -> int:
    """Rows of a tile: the mean rows of an expert at work, rounded up; what is not filled is computed in vain."""
    mean = choices / max(min(choices, experts), 1)
    return next((h for h in HEIGHTS if mean <= h), HEIGHTS[-1])


def candidates(kind: str, height: int, dtype: torch.dtype, arch: int) -> list[Config]:
    """For kind "esmm", "project" (first projection and activation) or "esfk"; the default first.

    arch: 10 times the compute capability, 90 for an H100.
    """
    figures = (_WIDE if dtype == torch.float32 else _NARROW)[kind][height]
    if arch >= 90 and dtype != torch.float32:
        figures = figures + _HOPPER[kind].get(height, [])
    return [Config(*each) for each in figures]


def with_split(config: Config, tiles: int, width: int, depth: int, processors: int) -> Config:
    """Split the sum where a launch would leave processors idle, never below four steps a part."""
    programs = tiles * -(-width // config.columns)
    steps = depth // (4 * config.depth)
    split = 1
    while 2 * split <= min(MOST_SPLITS, steps) and 2 * split * programs <= processors:
        split *= 2
    return replace(config, split=split)


def precision(dtype: torch.dtype) -> str:
    """How ``tiles.dot`` multiplies: float32 in three passes of TF32 (about 1e-6 off), in one if torch allows TF32.

    16-bit types are multiplied as they are. Only the interpreter, which cannot multiply bfloat16, makes them float32.
    """
    if dtype != torch.float32:
        return WIDENED if interpreting() else "tf32"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def key(kind: str, dtype: str, precise: str, shape: Sequence[int], choices: int, height: int) -> str:
    """What a launch's best configuration depends on: kind, type (of float32 its precision too), the weight's shape,
    the number of choices up to a power of two, and the tile's height."""
    rounded = 1 << (choices - 1).bit_length()
    return f"{kind} {dtype} {precise} {list(shape)} {rounded} choices {height} rows"


_KEY = re.compile(
    r"(esmm|project|esfk) torch\.(bfloat16|float16|float32) (|tf32|tf32x3) \[\d+, \d+, \d+\] \d+ choices (\d+) rows"
)


def parse_key(text: str) -> tuple[str, int, torch.dtype] | None:
    """Kind, height and type of a launch, as ``candidates`` takes them; None for what is no key."""
    found = _KEY.fullmatch(text)
    if found is None or int(found[4]) not in HEIGHTS:
        return None
    return found[1], int(found[4]), getattr(torch, found[2])

"""The kernels as they are specialised for real models: what ``compiled`` compiles without a GPU.

Sizes are multiples of 16, and of the blocks' too unless a case is ragged (2,880 of gpt-oss). Biases, gates and saved
projections are given, so that each kernel does all it can.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .activation import constants as activation
from .config import HEIGHTS, Config, candidates
from .elementwise import activate_backward_kernel, activate_kernel
from .esfk import BIAS_COLUMNS, BIAS_ROWS, esfk_kernel
from .esmm import esmm_kernel
from .index import count_kernel, place_kernel
from .project import project_kernel
from .reduce import reduce_kernel

BLOCK = 1024
Pointers = Mapping[str, str | None]
INDEX = {"order": "i32", "tile_expert": "i32", "start": "i32", "count": "i32"}


@dataclass(frozen=True)
class Case:
    """pointers: the type of what each pointer argument points at, None for one not given.

    Whatever else the kernel takes and ``constants`` do not hold is an integer; those of the model are multiples of 16.
    """

    kernel: Any
    label: str
    dtype: torch.dtype
    pointers: Pointers
    constants: dict[str, Any]
    height: int = 0
    config: Config = field(default_factory=lambda: Config(0, 0, 0, warps=4, stages=3))


def cases(arch: int, everything: bool = False) -> Iterator[Case]:
    """What runs on sm_<arch>, in the default configurations: bfloat16 at all heights, the other types at the highest,
    the exact float32 product at the lowest too. With ``everything`` all types, heights and configurations there are."""
    low, high = HEIGHTS[0], HEIGHTS[-1]
    usual = {
        (torch.bfloat16, "tf32"): HEIGHTS,
        (torch.float16, "tf32"): (high,),
        (torch.float32, "tf32x3"): (low, high),
        (torch.float32, "tf32"): (high,),
    }
    for (dtype, precision), heights in usual.items():
        for height in HEIGHTS if everything else heights:
            for kind, case in (("esmm", _esmm), ("project", _project), ("esfk", _esfk)):
                able = candidates(kind, height, dtype, arch)
                for config in able if everything else able[:1]:
                    yield case(dtype, height, config, True, precision)
                    if height == high and (everything or dtype == torch.bfloat16):
                        yield case(dtype, height, config, False, precision)
    yield from _small(torch.bfloat16)


def _label(name: str, even: bool, dtype: torch.dtype, precision: str) -> str:
    """Of a float32 product the precision is told, of any the ragged sizes."""
    return name + (f" {precision}" if dtype == torch.float32 else "") + ("" if even else " ragged")


def _esmm(dtype: torch.dtype, height: int, config: Config, even: bool, precision: str) -> Case:
    given = dict.fromkeys(("x", "weight", "bias", "out"), element(dtype)) | INDEX | {"gates": "fp32"}
    constants = {"TRANSPOSED": False, "PER_ROW": 1, "ROWS": height} | _blocks(config, even, precision)
    return Case(esmm_kernel, _label("esmm", even, dtype, precision), dtype, given, constants, height, config)


def _project(dtype: torch.dtype, height: int, config: Config, even: bool, precision: str) -> Case:
    given = dict.fromkeys(("x", "gate_up", "bias", "hidden", "saved"), element(dtype)) | INDEX
    constants = activation("silu") | {"MATRICES": 2, "TRANSPOSED": False, "MIXED": False, "PER_ROW": 4, "ROWS": height}
    constants |= _blocks(config, even, precision)
    return Case(project_kernel, _label("project", even, dtype, precision), dtype, given, constants, height, config)


def _esfk(dtype: torch.dtype, height: int, config: Config, even: bool, precision: str) -> Case:
    given = dict.fromkeys(("x", "weight", "dy", "dx", "dweight", "dbias"), element(dtype)) | INDEX | {"gates": "fp32"}
    constants = {
        "TRANSPOSED": False,
        "X_PER_ROW": 1,
        "DY_PER_ROW": 4,
        "HEIGHT": height,
        "ROWS": config.rows,
        "EVEN_ROWS": even,
    }
    constants |= {"BIAS_ROWS": BIAS_ROWS, "BIAS_COLUMNS": BIAS_COLUMNS} | _blocks(config, even, precision)
    return Case(esfk_kernel, _label("esfk", even, dtype, precision), dtype, given, constants, height, config)


def _blocks(config: Config, even: bool, precision: str) -> dict[str, Any]:
    sizes = {"COLUMNS": config.columns, "DEPTH": config.depth}
    # 2,880 is a multiple of every depth but not of every number of columns.
    return sizes | {"EVEN_DEPTH": True, "EVEN_COLUMNS": even, "PRECISION": precision}


def _small(dtype: torch.dtype) -> Iterator[Case]:
    """The kernels without products, in the one configuration that each has."""
    t = element(dtype)
    ids, block = {"ids": "i64"}, {"BLOCK": BLOCK}
    act = activation("silu") | {"MATRICES": 2, "MIXED": False} | block
    activated: Pointers = ids | {"projected": t, "gates": "fp32", "hidden": t} | {"saved": None}
    behind = ids | dict.fromkeys(("dhidden", "saved", "dy", "down_bias", "dprojected"), t)
    yield Case(count_kernel, "index: count", dtype, ids | {"count": "i32", "report": "i64"}, block)
    yield Case(place_kernel, "index: place", dtype, ids | INDEX, {"HEIGHT": 64, "EXPERTS": 128} | block)
    yield Case(reduce_kernel, "reduce", dtype, ids | {"parts": t, "y": t}, {"TOP_K": 4, "SPLITS": 1} | block)
    yield Case(activate_kernel, "activate", dtype, activated, {"SPLITS": 1} | act)
    behind |= {"gates": "fp32", "dgates": "fp32"}
    yield Case(activate_backward_kernel, "activate backward", dtype, behind, {"TOP_K": 4} | act)


def element(dtype: torch.dtype) -> str:
    """Triton's name of a type."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]

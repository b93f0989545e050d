"""Measured tables of GPUs, as data: what one operator takes on one type of GPU under one serving engine.

The profiler reads them from files; the planner is given them and asks by name. Times are seconds, sizes bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["measured", "replaced", "scaled"]


@dataclass(frozen=True)
class Origin:
    """Where times come from, and one sentence about it.

    ``measured``: on this GPU, under this engine. ``replaced``: some of them were found wrong, and those of another
    version or engine stand in their place. ``scaled``: computed from another GPU's by the two data sheets.
    """

    kind: Kind
    text: str


@dataclass(frozen=True)
class Table:
    """One operator of one type of GPU and one engine.

    ``frame`` has a row per shape. Its columns are those of the operator (docs/systems.md lists them all), and

    - ``seconds`` (float64): the time of one call on one GPU, or of one collective among all of them;
    - ``kernel`` (str): what computed it; the same shape may be there with several;
    - ``source`` (str): engine and version in which the row was measured, such as ``vllm 0.24.0``; of a scaled row, with
      the GPU type: ``vllm 0.24.0 on h100_sxm``;
    - ``origin`` (str): measured, replaced or scaled, row by row. ``Table.origin`` is the least trusted of them.

    ``version`` is the newest that contributes. Do not change ``frame``: tables are shared.
    """

    operator: str
    system: str
    engine: str
    version: str
    frame: pd.DataFrame
    origin: Origin


@dataclass(frozen=True)
class System:
    """The data sheet of one type of GPU and of the node around it.

    Rates of links are bytes per second, of one GPU, in one direction. ``flops``: FLOP per second, dense, by the type
    that multiplies: ``bfloat16``, ``fp8``, ``int8``, ``fp4``, ``float32``; a type that is not there has no hardware.
    """

    name: str
    generation: str
    memory_bytes: float
    memory_bytes_per_second: float
    flops: Mapping[str, float]
    intra_node_bytes_per_second: float
    inter_node_bytes_per_second: float
    pcie_bytes_per_second: float
    gpus_per_node: int
    watts: float | None = None
    gpus_per_rack: int | None = None
    inter_rack_bytes_per_second: float | None = None


class Tables(Protocol):
    """A collection of tables. Every question that it cannot answer raises MoeplanError with the nearest it can."""

    def systems(self) -> tuple[str, ...]:
        """Names of the GPU types, sorted."""
        ...

    def system(self, name: str) -> System:
        """The data sheet of one GPU type."""
        ...

    def engines(self, system: str) -> tuple[str, ...]:
        """Engines with any table of this GPU type, sorted: ``sglang``, ``trtllm``, ``vllm``; also ``nccl``."""
        ...

    def operators(self, system: str, engine: str) -> tuple[str, ...]:
        """Operators that this engine has a measured table for on this GPU type, sorted."""
        ...

    def table(self, operator: str, system: str, engine: str, version: str | None = None) -> Table:
        """Without ``version`` every curve of the newest version that has it; with it, that version's alone."""
        ...


# How a type of numbers, as tables name it, is stored and multiplied: bytes of a weight, bytes of an activation, and the
# key of ``System.flops``. Scales of nvfp4 (one byte for 16 weights) are included. ``sq``: SmoothQuant, int8 both.
# Weight-only types (``wo``, ``w4a16``) are multiplied as bfloat16.
NUMBERS: Mapping[str, tuple[float, float, str]] = {
    "bfloat16": (2.0, 2.0, "bfloat16"),
    "float16": (2.0, 2.0, "bfloat16"),
    "half": (2.0, 2.0, "bfloat16"),
    "int8": (1.0, 1.0, "int8"),
    "sq": (1.0, 1.0, "int8"),
    "int8_wo": (1.0, 2.0, "bfloat16"),
    "int4_wo": (0.5, 2.0, "bfloat16"),
    "fp8": (1.0, 1.0, "fp8"),
    "fp8_e4m3": (1.0, 1.0, "fp8"),
    "fp8_block": (1.0, 1.0, "fp8"),
    "w4afp8": (0.5, 1.0, "fp8"),
    "w4a8_mxfp4_mxfp8": (0.5, 1.0, "fp8"),
    "w4a16_mxfp4": (0.5, 2.0, "bfloat16"),
    "nvfp4": (9 / 16, 9 / 16, "fp4"),
    "fp4": (0.5, 0.5, "fp4"),
}

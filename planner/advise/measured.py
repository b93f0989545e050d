"""Even rows of expert kernels for a model, from the measured tables of a GPU and an engine."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...spec.errors import MoeplanError
from ...spec.model import Model
from ...spec.tabled import Tables
from .kernel import KernelTable

if TYPE_CHECKING:
    import pandas as pd

EVEN = "balanced"
FORMATS = {
    "fp8": ("fp8_block", "fp8"),
    "mxfp4": ("w4a16_mxfp4", "w4a8_mxfp4_mxfp8"),
    "nvfp4": ("nvfp4",),
    "int4": ("int4_wo",),
    "bf16": ("bfloat16", "float16"),
    "f16": ("float16", "bfloat16"),
    "f32": ("bfloat16", "float16"),
}
"""What tables call the format of a model's experts, the likeliest first."""


def kernel_table(tables: Tables, system: str, engine: str, model: Model, dtype: str | None = None) -> KernelTable:
    """The rows of the model's expert shape, or of the nearest shape, scaled. dtype: as tables name it.

    Raises MoeplanError where the format is not there, naming those that are.
    """
    table = tables.table("moe", system, engine)
    even = table.frame[(table.frame.routing == EVEN) & (table.frame.tp == 1)]
    if not len(even):
        raise MoeplanError(f"the moe table of {engine} on {system} has no {EVEN} rows: choose another --engine")
    block = model.moe_block()
    moe = block.moe
    assert moe is not None
    there = sorted(set(even.dtype))
    wanted = (dtype,) if dtype else FORMATS.get(moe.storage.name if moe.storage else model.dtype, ())
    chosen = next((name for name in wanted if name in there), None)
    if chosen is None:
        stored = dtype or (moe.storage.name if moe.storage else model.dtype)
        raise MoeplanError(
            f"{engine} on {system} has no rows of experts in {stored}; pass one of these with --format: "
            f"{', '.join(there)}"
        )
    rows, ratio = _nearest(even[even.dtype == chosen], block.hidden_size, moe.ffn_size, (moe.num_experts, moe.top_k))
    kernel = rows.kernel.value_counts().sort_index().idxmax()
    rows = rows[rows.kernel == kernel]
    shape = rows.iloc[0]
    origin = (
        f"{', '.join(sorted(set(rows.source)))} on {system}, {kernel}, {chosen}, {shape.experts} experts of "
        f"{shape.hidden} x {shape.ffn}, top-{shape.top_k}: {len(rows)} rows, {', '.join(sorted(set(rows.origin)))}"
        + (f"; scaled by {ratio:.2f} to {block.hidden_size} x {moe.ffn_size}" if ratio != 1 else "")
    )
    return KernelTable.of(
        rows.ep.to_numpy(),
        rows.tokens.to_numpy(),
        rows.seconds.to_numpy(),
        int(shape.experts),
        int(shape.top_k),
        ratio=ratio,
        origin=origin,
    )


def _nearest(rows: "pd.DataFrame", hidden: int, ffn: int, counts: Sequence[int]) -> tuple["pd.DataFrame", float]:
    """Rows of the shape nearest in size, then in experts and top-k, and the size wanted over that of the rows."""
    shapes = rows[["hidden", "ffn", "experts", "top_k"]].drop_duplicates().sort_values(["hidden", "ffn", "experts"])
    sizes = np.log(shapes.hidden * shapes.ffn / (hidden * ffn)).abs()
    exact = ((shapes.hidden != hidden) | (shapes.ffn != ffn)) * 0.01
    other = np.log(shapes.experts / counts[0]).abs() + np.log(shapes.top_k / counts[1]).abs()
    best = shapes.iloc[int(np.argmin((sizes + exact + 0.05 * other).to_numpy()))]
    same = (rows[["hidden", "ffn", "experts", "top_k"]] == best).all(axis=1)
    ratio = hidden * ffn / float(best.hidden * best.ffn)
    return rows[same], 1.0 if (best.hidden, best.ffn) == (hidden, ffn) else ratio

"""One file as a frame: columns named and checked, units mended, repeats of a shape merged."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...spec.errors import DocumentError
from ...spec.tabled import NUMBERS
from ...spec.texts import show
from .files import read_parquet
from .layouts import NAMES, TEXTS, Layout

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


def read_frame(path: Path, layout: Layout) -> "pd.DataFrame":
    """The rows of a file under the names of ``layout``, one for each shape and kernel, ``seconds`` last.

    Repeats of a measurement are their median. ``bytes`` is counted in elements there, and multiplied here by the size
    of one. Raises DocumentError that names the file and the column.
    """
    import pandas as pd

    raw = read_parquet(path)
    names = {name: layout.own.get(name) or NAMES.get(name, name) for name in raw.column_names}
    theirs = {ours: name for name, ours in reversed(names.items()) if name not in layout.seconds}
    columns: dict[str, object] = {}
    for ours in ("kernel", *layout.columns, *layout.optional):
        if ours in theirs:
            columns[ours] = _column(path, raw, theirs[ours], ours)
        elif ours in layout.optional:
            columns[ours] = layout.optional[ours]
        else:
            expected = next((name for name, known in {**NAMES, **layout.own}.items() if known == ours), ours)
            raise DocumentError(f"{path}: no column {expected!r}: not a {layout.file} table of a known layout")
    seconds = _seconds(path, raw, layout)
    frame = pd.DataFrame(columns | dict(layout.constant), index=range(len(seconds)))
    if "bytes" in frame:
        frame["bytes"] *= [int(NUMBERS[name][1]) for name in frame["dtype"]]
    frame["seconds"] = seconds
    shape = [name for name in frame.columns if name != "seconds"]
    if frame.duplicated(shape).any():
        frame = frame.groupby(shape, sort=False, as_index=False)[["seconds"]].median()
    return frame


def _column(path: Path, raw: "pa.Table", name: str, ours: str) -> "np.ndarray | pd.Series":
    import pyarrow as pa

    column = raw.column(name)
    texts = ours in TEXTS
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    wanted = is_text if texts else pa.types.is_integer(column.type)
    if not wanted or column.null_count:
        what = f"{column.null_count} empty values" if wanted else str(column.type)
        raise DocumentError(f"{path}: column {name!r}: expected {'texts' if texts else 'whole numbers'}, got {what}")
    if texts:
        return column.dictionary_encode().to_pandas().astype("str")
    values = column.to_numpy().astype(np.int64)
    if values.size and values.min() < 0:
        raise DocumentError(f"{path}: column {name!r}: {values.min()}: expected numbers from 0")
    return values


def _seconds(path: Path, raw: "pa.Table", layout: Layout) -> np.ndarray:
    import pyarrow as pa

    total = np.zeros(raw.num_rows)
    for name in layout.seconds:
        if name not in raw.column_names:
            raise DocumentError(f"{path}: no column {name!r}: not a {layout.file} table of a known layout")
        column = raw.column(name)
        if not pa.types.is_floating(column.type) or column.null_count:
            raise DocumentError(f"{path}: column {name!r}: expected times, got {column.type} or empty values")
        total += column.to_numpy() * layout.unit
    wrong = ~np.isfinite(total) if layout.differences else ~(np.isfinite(total) & (total > 0))
    if wrong.any():
        raise DocumentError(f"{path}: {int(wrong.sum())} rows without a time, the first {show(total[wrong][0])}")
    return total

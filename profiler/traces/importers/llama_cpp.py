"""llama.cpp's routing as CSV: ``layer,expert``, a row per routed activation, as its moe-trace example writes it.

With or without the header; further columns may name the token and the expert's rank in it (``phase,token,layer,rank,
expert``), which makes the rows a per-token recording, or a count. Layers are the model's own numbers.
Source: ggml-org/llama.cpp pull request 28544, examples/moe-trace.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from ....spec.errors import DocumentError
from ....spec.model import MAX_EXPERTS, MAX_LAYERS
from ....spec.trace import Trace
from .files import file_size, readable
from .options import Options
from .records import MAX_COUNT, MAX_COUNTS, counts_trace, limit_choices, ranges, tokens_trace

PLAIN = ["layer", "expert"]
COUNT = ("count", "hits", "tokens")
ROWS = 2**20  # read at a time
MAX_LINE = 4096
SOURCE = "llama.cpp routing"


def read(path: Path, options: Options) -> tuple[Trace, list[str]]:
    """A CSV file."""
    notes: list[str] = []
    names, header = _names(path)
    if "token" in names:
        return _tokens(path, names, header, options, notes), notes
    counts, rows = _counts(path, names, header, options)
    numbers = np.flatnonzero(counts.any(axis=1))
    notes.append(f"{rows} rows of layers {ranges(numbers)} counted")
    if options.num_experts is None:
        notes.append(f"the file does not tell the number of experts: the highest number seen gives {counts.shape[1]}")
    trace = counts_trace(
        counts[numbers], notes, options=options, where=str(path), source=SOURCE, layer_numbers=numbers.tolist()
    )
    return trace, notes


def _names(path: Path) -> tuple[list[str], int]:
    """Columns, and the lines of their header (0 or 1)."""
    file_size(path)
    with open(path, "rb") as file:
        line = file.readline(MAX_LINE)
    fields = [field.strip().strip('"').lower() for field in line.decode("utf-8", "replace").split(",")]
    if "layer" in fields and "expert" in fields and len(set(fields)) == len(fields):
        return fields, 1
    if len(fields) == 2 and all(field.isdecimal() for field in fields):
        return PLAIN, 0
    raise DocumentError(f"{path}: expected columns layer,expert of whole numbers, got {', '.join(fields)[:80]!r}")


def _pieces(path: Path, names: list[str], header: int, columns: list[str]) -> pd.io.parsers.TextFileReader:
    kinds = dict.fromkeys(columns, "int64")
    return pd.read_csv(path, names=names, skiprows=header, usecols=columns, dtype=kinds, chunksize=ROWS)


def _counts(path: Path, names: list[str], header: int, options: Options) -> tuple[np.ndarray, int]:
    """Counts [layers, experts] by the file's own layer numbers, and the rows that made them."""
    count = next((name for name in COUNT if name in names), None)
    width = (options.num_experts or 0) + (options.zero_experts or 0)
    total, rows = np.zeros((0, width)), 0
    with readable(path, "CSV"):
        for piece in _pieces(path, names, header, [*PLAIN, *([count] if count else [])]):
            if not len(piece):
                continue
            layer, expert = (_within(piece, name, path) for name in PLAIN)
            weights = piece[count].to_numpy() if count else np.ones(len(piece), np.int64)
            if ((weights < 0) | (weights > MAX_COUNT)).any():
                raise DocumentError(f"{path}: {count}: expected counts of 0..{MAX_COUNT:g}")
            shape = max(len(total), int(layer.max()) + 1), max(total.shape[1], int(expert.max()) + 1)
            if width and shape[1] > width:
                raise DocumentError(
                    f"{path}: names expert {shape[1] - 1}, but there are {width}: if higher ids are identity experts, "
                    "as LongCat's, give --zero-experts"
                )
            if shape[0] * shape[1] > MAX_COUNTS:
                raise DocumentError(f"{path}: {shape[0]} layers x {shape[1]} experts: at most {MAX_COUNTS} counts")
            grown = np.zeros(shape)
            grown[: len(total), : total.shape[1]] = total
            np.add.at(grown, (layer, expert), weights)
            total, rows = grown, rows + len(piece)
    if not rows:
        raise DocumentError(f"{path}: no rows")
    return total, rows


def _tokens(path: Path, names: list[str], header: int, options: Options, notes: list[str]) -> Trace:
    """Rows with their token, in order of ranks where these are told."""
    columns = ["token", *PLAIN, *(["rank"] if "rank" in names else [])]
    pieces: list[pd.DataFrame] = []
    with readable(path, "CSV"):
        for piece in _pieces(path, names, header, columns):
            for name in PLAIN if len(piece) else []:
                _within(piece, name, path)
            pieces.append(piece.astype("int32", errors="raise") if piece["token"].abs().max() < 2**31 else piece)
            limit_choices(0, sum(map(len, pieces)), str(path))
    if not sum(map(len, pieces)):
        raise DocumentError(f"{path}: no rows")
    table = pd.concat(pieces, ignore_index=True)
    table = table.sort_values([name for name in ("token", "layer", "rank") if name in columns], kind="stable")
    tokens, layers = np.unique(table["token"]), np.unique(table["layer"])
    width, rest = divmod(len(table), len(tokens) * len(layers))
    sizes = table.groupby(["token", "layer"]).size()
    if rest or (sizes != width).any() or len(sizes) != len(tokens) * len(layers):
        raise DocumentError(
            f"{path}: tokens name different numbers of experts or layers: delete the column token to import counts"
        )
    ids = table["expert"].to_numpy(np.int32).reshape(len(tokens), len(layers), width)
    notes.append("tokens of the file taken for one sequence")
    trace = tokens_trace(
        ids,
        np.array([len(tokens)]),
        notes,
        options=options,
        where=str(path),
        source=SOURCE,
        layer_numbers=layers.tolist(),
    )
    if "rank" not in names:
        notes.append("no column rank: the first expert of a token may not be the heaviest")
    return trace


def _within(piece: pd.DataFrame, name: str, path: Path) -> np.ndarray:
    """A column of layer or expert numbers, checked."""
    values = piece[name].to_numpy()
    most = MAX_LAYERS if name == "layer" else MAX_EXPERTS
    if (values < 0).any() or (values >= most).any():
        raise DocumentError(f"{path}: {name}: expected 0..{most - 1}, found {values.min()}..{values.max()}")
    return values

"""vLLM's routed experts, int16 [tokens, layers, top_k] per request: npy, npz (an array per request), JSON, JSON lines.

An npz may instead hold one array of all tokens beside ``seq_len``, the tokens of each request.
"""

from pathlib import Path

import numpy as np

from ....spec.errors import DocumentError
from ....spec.trace import Trace
from .files import file_size, read_npy, read_npz, recording
from .records import Options
from .requests import answers_trace, is_flat, join, read_answers, requests_trace

SUFFIXES = (".npz", ".npy", ".json", ".jsonl")
BALANCE_LINE = b"EPLB step: avg_tokens="
SOURCE = "vLLM routed experts"


def read(path: Path, options: Options) -> tuple[Trace, list[str]]:
    """One file, or a folder of files with a request each."""
    notes: list[str] = []
    files = recording(path, SUFFIXES)
    if len(files) == 1 and files[0].suffix not in (".npz", ".npy"):
        refuse_log(files[0])
        answers = read_answers(files[0])
        if is_flat(answers):
            raise DocumentError(f"{path}: base64 without a shape, as SGLang returns it: import it with --from sglang")
        return answers_trace(answers, notes, options=options, where=str(path), source=SOURCE), notes
    arrays = [array for file in files for array in _arrays(file)]
    return requests_trace(arrays, notes, options=options, where=str(path), source=SOURCE), notes


def refuse_log(path: Path) -> None:
    """A vLLM log tells how balanced the load was, not which experts made it so."""
    file_size(path)
    with open(path, "rb") as f:
        if BALANCE_LINE in f.read(16 * 2**20):
            raise DocumentError(
                f"{path}: a vLLM log holds only balance figures (EPLB step: ...), not routing: record with "
                "--enable-return-routed-experts"
            )


def _arrays(file: Path) -> list[np.ndarray]:
    if file.suffix == ".npy":
        return [read_npy(file)]
    if file.suffix != ".npz":
        raise DocumentError(f"{file}: give one JSON file, or a folder of npy and npz files")
    arrays = read_npz(file)
    lengths = arrays.pop("seq_len", None)
    if not arrays:
        raise DocumentError(f"{file}: an empty record")
    for name, array in arrays.items():
        join([array], f"{file}: {name}")
    if lengths is None:
        return list(arrays.values())
    (name, array), *others = arrays.items()
    whole = lengths.ndim == 1 and lengths.dtype.kind in "iu" and ((lengths > 0) & (lengths <= len(array))).all()
    if others or not whole or lengths.sum() != len(array):
        raise DocumentError(
            f"{file}: seq_len: expected positive integers that sum to the {len(array)} tokens of {name}"
        )
    return np.split(array, np.cumsum(lengths)[:-1])

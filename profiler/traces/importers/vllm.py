"""vLLM's routed experts, [tokens, layers, top_k] per request: npy, npz (an array per request), JSON, JSON lines.

An npz may instead hold one array of all tokens beside ``seq_len``, the tokens of each request. Integers of any width:
uint8 or uint16 since vLLM 0.33, int16 before. Expert load that was dumped is counts, see counts.py.
"""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ....spec.document import show
from ....spec.errors import DocumentError
from ....spec.trace import Trace
from .counts import holds_counts, read_counts
from .files import file_size, read_npy, read_npz, read_safetensors, read_torch, recording
from .json_files import read_bodies
from .options import Options
from .records import add_counts, counts_trace, limit_choices
from .requests import answers_of, answers_trace, is_flat, join, requests_trace

SUFFIXES = (".npz", ".npy", ".json", ".jsonl")
LOADS = (".pt", ".pth", ".safetensors")
BALANCE_LINE = b"EPLB step: "
SOURCE = "vLLM routed experts"
LOAD_SOURCE = "vLLM expert load"


def read(path: Path, options: Options) -> tuple[Trace, list[str]]:
    """One file, or a folder of files with a request each."""
    notes: list[str] = []
    files = recording(path, SUFFIXES)
    if len(files) == 1 and files[0].suffix not in (".npz", ".npy"):
        return (_read_load if files[0].suffix in LOADS else _read_json)(files[0], options, notes), notes
    if len(files) == 1 and files[0].suffix == ".npz":
        arrays = read_npz(files[0])
        if holds_counts(arrays):
            return _load_trace([(str(files[0]), arrays)], options, str(path), notes), notes
    requests = [array for file in files for array in _arrays(file)]
    return requests_trace(requests, notes, options=options, where=str(path), source=SOURCE), notes


def refuse_log(path: Path) -> None:
    """A vLLM log tells how balanced the load was, not which experts made it so."""
    file_size(path)
    if path.suffix in (".json", ".jsonl"):
        return  # an answer may speak of anything
    with open(path, "rb") as f:
        if BALANCE_LINE in f.read(16 * 2**20):
            raise DocumentError(
                f"{path}: a vLLM log holds only balance figures (EPLB step: ...), not routing: record with "
                "--enable-return-routed-experts"
            )


def _read_json(file: Path, options: Options, notes: list[str]) -> Trace:
    refuse_log(file)
    bodies = read_bodies(file)
    where, first = next(bodies)
    if holds_counts(first):
        return _load_trace(list(chain([(where, first)], bodies)), options, str(file), notes)
    if is_flat(first):
        raise DocumentError(f"{file}: base64 without a shape, as SGLang returns it: import it with --from sglang")
    answers = answers_of(chain([(where, first)], bodies), notes, str(file))
    return answers_trace(answers, notes, options=options, where=str(file), source=SOURCE)


def _read_load(file: Path, options: Options, notes: list[str]) -> Trace:
    """Expert load as tensors; a file with one tensor and no name of ours is global_expert_load_window."""
    body: Any = read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
    if isinstance(body, dict) and not holds_counts(body) and len(body) == 1:
        (name,) = body
        notes.append(f"{show(name)}: taken for expert load by logical experts, [layers, experts] or its steps")
        body = {"expert_load": body[name]}
    if not holds_counts(body):
        raise DocumentError(
            f"{file}: no expert load: expected a tensor expert_load, or expert_load_window or expert_load_pass with "
            "physical_to_logical_map; routed experts are imported from JSON, npy and npz"
        )
    return _load_trace([(str(file), body)], options, str(file), notes)


def _load_trace(bodies: list[tuple[str, Any]], options: Options, where: str, notes: list[str]) -> Trace:
    total: np.ndarray | None = None
    for place, body in bodies:
        if not holds_counts(body):
            raise DocumentError(f"{place}: no expert load, but other documents of the file have one")
        total = add_counts(total, read_counts(body, place, options, notes), place)
    assert total is not None
    if len(bodies) > 1:
        notes.append(f"{len(bodies)} dumps summed: right only if each counts other steps")
    return counts_trace(total, notes, options=options, where=where, source=LOAD_SOURCE)


def _arrays(file: Path) -> list[np.ndarray]:
    if file.suffix == ".npy":
        array = read_npy(file)
        limit_choices(0, array.size, str(file))
        return [array]
    if file.suffix != ".npz":
        raise DocumentError(f"{file}: give one JSON file, or a folder of npy and npz files")
    arrays = read_npz(file)
    lengths = arrays.pop("seq_len", None)
    if not arrays:
        raise DocumentError(f"{file}: an empty record")
    limit_choices(0, sum(array.size for array in arrays.values()), str(file))
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

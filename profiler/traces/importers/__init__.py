"""Routing that other programs recorded, as Traces."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ....spec.engines import engine_name
from ....spec.errors import DocumentError
from ....spec.trace import Trace
from . import neutral, sglang, tensorrt_llm, transformers_logits, vllm
from .files import file_size, read_npz, read_torch, readable, recording
from .records import Options
from .requests import is_flat, read_answers

MAX_MESSAGE = 500

__all__ = ["IMPORTERS", "import_trace", "recognise"]

Importer = Callable[[Path, Options], tuple[Trace, list[str]]]
IMPORTERS: dict[str, Importer] = {
    "sglang": sglang.read,
    "vllm": vllm.read,
    "tensorrt-llm": tensorrt_llm.read,
    "transformers": transformers_logits.read,
    "npz": neutral.read,
}


def import_trace(
    path: str | Path,
    kind: str | None = None,
    *,
    top_k: int | None = None,
    num_experts: int | None = None,
    layers: int | None = None,
) -> tuple[Trace, list[str]]:
    """A Trace and what is to be known of it: what was recorded, dropped, mapped back, counted once.

    path: a file, or a folder with the files of one recording. kind: one of IMPORTERS; without it, what the content
    shows. top_k, num_experts, layers: needed where the record does not tell them, checked where it does.
    Raises DocumentError, one line, for whatever cannot be imported.
    """
    path = Path(path)
    for name, value in (("--top-k", top_k), ("--num-experts", num_experts), ("--layers", layers)):
        if value is not None and value < 1:
            raise DocumentError(f"{name}: must be at least 1, got {value}")
    try:
        kind = engine_name(kind) if kind else recognise(path)
        if kind not in IMPORTERS:
            raise DocumentError(f"no importer {kind!r}: {', '.join(IMPORTERS)}")
        return IMPORTERS[kind](path, Options(top_k, num_experts, layers))
    except DocumentError as error:
        raise DocumentError(_one_line(str(error))) from None
    except MemoryError:
        raise DocumentError(_one_line(f"{path}: needs more memory than there is: import a part of it")) from None


def _one_line(text: str) -> str:
    """Names of foreign files and fields are part of messages, and may hold anything."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]}..."


def recognise(path: Path) -> str:
    """Which program wrote it, from its content."""
    if path.is_dir():
        if (path / tensorrt_llm.META).exists():
            return "tensorrt-llm"
        path = recording(path, (".pt", ".safetensors", *vllm.SUFFIXES))[0]
    file_size(path)
    if path.suffix == ".npy":
        return "vllm"
    if path.suffix == ".safetensors":
        return "transformers"
    if path.suffix == ".npz":
        return _recognise_npz(path)
    if zipfile.is_zipfile(path):
        return "sglang" if sglang.recognise(read_torch(path, peek=True)) else "transformers"
    if path.suffix == ".pt":
        read_torch(path)  # says what is wrong
    vllm.refuse_log(path)
    if path.suffix not in (".json", ".jsonl"):
        raise DocumentError(f"{path}: not a recording that is recognised: say which with --from {'|'.join(IMPORTERS)}")
    return "sglang" if is_flat(read_answers(path)) else "vllm"


def _recognise_npz(path: Path) -> str:
    with readable(path, "npz"):
        arrays = read_npz(path)
    if {"expert_ids", "expert_counts"} & arrays.keys():
        return "npz"
    kinds = {array.dtype.kind for name, array in arrays.items() if name != "seq_len"}
    if kinds and kinds <= {"i", "u"}:
        return "vllm"
    if kinds == {"f"} and all(np.ndim(array) in (2, 3) for array in arrays.values()):
        return "transformers"
    raise DocumentError(f"{path}: neither a trace, nor routed experts, nor router logits: {', '.join(arrays)[:100]}")

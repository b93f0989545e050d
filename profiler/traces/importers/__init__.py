"""Routing that other programs recorded, as Traces."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ....spec.engines import engine_name
from ....spec.errors import DocumentError, MoeplanError
from ....spec.trace import Trace
from . import llama_cpp, megatron, neutral, rows, sglang, tensorrt_llm, transformers_logits, vllm
from .counts import holds_counts
from .facts import model_facts
from .files import file_size, read_npz, read_torch, recording
from .json_files import ACCEPTED, found, read_bodies
from .options import Options
from .requests import is_flat

MAX_MESSAGE = 500

__all__ = ["IMPORTERS", "import_trace", "recognise"]

Importer = Callable[[Path, Options], tuple[Trace, list[str]]]
IMPORTERS: dict[str, Importer] = {
    "sglang": sglang.read,
    "vllm": vllm.read,
    "tensorrt-llm": tensorrt_llm.read,
    "megatron": megatron.read,
    "llama.cpp": llama_cpp.read,
    "transformers": transformers_logits.read,
    "rows": rows.read,
    "npz": neutral.read,
}


def import_trace(
    path: str | Path,
    kind: str | None = None,
    *,
    top_k: int | None = None,
    num_experts: int | None = None,
    layers: int | None = None,
    zero_experts: int | None = None,
    model: str | None = None,
    highest_logits: bool = True,
) -> tuple[Trace, list[str]]:
    """A Trace and what is to be known of it: what was recorded, inferred, checked, dropped, mapped back, counted once.

    path: a file, or a folder with the files of one recording. kind: one of IMPORTERS, as people spell it; without it,
    what the content shows. top_k, num_experts, layers: needed where the record does not tell them, checked where it
    does. zero_experts: identity experts above the real ones, whose choices are dropped. model: a catalogue name or a
    config.json, which tells all of these. highest_logits: whether router logits of an unnamed model may be taken to
    choose the highest ones, which models with groups or a correction bias do not.
    Raises MoeplanError, one line, for whatever cannot be imported.
    """
    path = Path(path)
    given = {"--top-k": top_k, "--num-experts": num_experts, "--layers": layers, "--zero-experts": zero_experts}
    for name, value in given.items():
        if value is not None and value < 1:
            raise DocumentError(f"{name}: must be at least 1, got {value}")
    facts = model_facts(model) if model is not None else None
    options = Options(top_k, num_experts, layers, zero_experts, facts, highest_logits).with_model()
    try:
        kind = _known(kind) if kind else recognise(path)
        return IMPORTERS[kind](path, options)
    except MoeplanError as error:
        raise DocumentError(_one_line(str(error))) from None
    except MemoryError:
        raise DocumentError(_one_line(f"{path}: needs more memory than there is: import a part of it")) from None


def _known(kind: str) -> str:
    name = engine_name(kind)
    if name not in IMPORTERS:
        raise DocumentError(f"no importer {kind!r}: {', '.join(IMPORTERS)}")
    return name


def _one_line(text: str) -> str:
    """Names of foreign files and fields are part of messages, and may hold anything."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]}..."


def recognise(path: Path) -> str:
    """Which program wrote it, from its content."""
    if path.is_dir():
        if (path / tensorrt_llm.META).exists():
            return "tensorrt-llm"
        path = recording(path, (".pt", ".safetensors", ".csv", *vllm.SUFFIXES))[0]
    file_size(path)
    if path.suffix == ".npy":
        return "vllm"
    if path.suffix == ".csv":
        return "llama.cpp"
    if path.suffix == ".safetensors":
        return "transformers"
    if path.suffix == ".npz":
        return _recognise_npz(path)
    if zipfile.is_zipfile(path):
        content = read_torch(path, peek=True)
        return "sglang" if sglang.recognise(content) else "vllm" if holds_counts(content) else "transformers"
    if path.suffix == ".pt":
        read_torch(path)  # says what is wrong
    vllm.refuse_log(path)
    if path.suffix not in (".json", ".jsonl"):
        raise DocumentError(f"{path}: not a recording that is recognised: say which with --from {'|'.join(IMPORTERS)}")
    return _recognise_json(path)


def _recognise_json(path: Path) -> str:
    """The program whose fields the first document has."""
    bodies = read_bodies(path)
    where, body = next(bodies)
    lines = path.suffix == ".jsonl" or next(bodies, None) is not None
    first = body[0] if isinstance(body, list) and body and isinstance(body[0], dict) else body
    if megatron.recognise(body):
        return "megatron"
    if sglang.recognise(body):
        return "sglang"
    if holds_counts(body):
        return "vllm"
    if (lines or first is not body) and rows.recognise(first):
        return "rows"
    if not lines and rows.recognise(body) and isinstance(body, list):
        raise DocumentError(
            f"{where}: a bare table of {len(body)} rows: counts [layers, experts] are imported with --from sglang, "
            "rows of tokens as JSON lines"
        )
    flat = is_flat(first if first is body else body)
    if flat is None and not isinstance(body, list | dict):
        raise DocumentError(f"{where}: expected a request's answer, got {found(body)}. {ACCEPTED}")
    return "sglang" if flat else "vllm"


def _recognise_npz(path: Path) -> str:
    arrays = read_npz(path)
    if {"expert_ids", "expert_counts"} & arrays.keys():
        return "npz"
    if holds_counts(arrays):
        return "vllm"
    kinds = {array.dtype.kind for name, array in arrays.items() if name != "seq_len"}
    if kinds and kinds <= {"i", "u"}:
        return "vllm"
    if kinds == {"f"} and all(np.ndim(array) in (2, 3) for array in arrays.values()):
        return "transformers"
    raise DocumentError(f"{path}: neither a trace, nor routed experts, nor router logits: {', '.join(arrays)[:100]}")

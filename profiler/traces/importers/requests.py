"""Routed experts that an engine returns with each request's answer, kept as JSON or JSON lines.

- vLLM: ``prompt_routed_experts`` and ``outputs[i]`` or ``choices[i].routed_experts``, nested lists [tokens, layers,
  top_k], or base64 of an npy.
- SGLang: ``meta_info.routed_experts``, base64 of int32 [tokens, layers, top_k] without its shape; every layer of the
  model, dense ones as zeros.

A bare nested list is one request, a list of them several. Engines clear their buffers with zeros, so a token's row of
zeros was not recorded (the last token of an answer is never routed, cached ones may be missing).
"""

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....spec.document import read_text, show
from ....spec.errors import DocumentError
from ....spec.model import MAX_EXPERTS, MAX_LAYERS
from ....spec.trace import MAX_CHOICES, Trace
from .files import readable
from .records import UNORDERED, Options, tokens_trace

FIELD = "routed_experts"
PROMPT = "prompt_routed_experts"


@dataclass(frozen=True)
class Answer:
    """One answer: its parts in order (lists or base64), and the tokens that the engine says it has."""

    parts: list[Any]
    tokens: int | None
    where: str


def read_answers(path: Path) -> list[Answer]:
    """Every answer with routed experts in a JSON or JSON lines file."""
    answers = [answer for where, body in _bodies(path) for answer in _answers(body, where)]
    if not answers:
        raise DocumentError(f"{path}: no request has {FIELD}: start the engine with --enable-return-routed-experts")
    return answers


def is_flat(answers: list[Answer]) -> bool:
    """Whether an answer is base64 of bare integers, as SGLang writes it."""
    return any(isinstance(part, str) and not part.startswith("k05VTVBZ") for a in answers for part in a.parts)


def answers_trace(answers: list[Answer], notes: list[str], *, options: Options, where: str, source: str) -> Trace:
    """A sequence per answer."""
    arrays = [_whole(answer) for answer in answers]
    flat = [(answer, values) for answer, values in zip(answers, arrays, strict=True) if values.ndim == 1]
    if flat:
        layers, top_k = _flat_shape(flat, options, where)
        for answer, values in flat:
            if values.size % (layers * top_k):
                raise DocumentError(f"{answer.where}: {values.size} integers are no multiple of {layers} x {top_k}")
        arrays = [values.reshape(-1, layers, top_k) if values.ndim == 1 else values for values in arrays]
    return requests_trace(arrays, notes, options=options, where=where, source=source)


def requests_trace(arrays: list[np.ndarray], notes: list[str], *, options: Options, where: str, source: str) -> Trace:
    """A sequence per request, each [tokens, layers, top_k] integers."""
    full = [array for array in arrays if len(array)]
    if len(full) < len(arrays):
        notes.append(f"{len(arrays) - len(full)} requests without a token: dropped")
    if not full:
        raise DocumentError(f"{where}: zero requests with tokens")
    ids = join(full, where)
    lengths = np.array([len(array) for array in full])
    trace = tokens_trace(ids, lengths, notes, options=options, where=where, source=source, zero_is_empty=True)
    notes.append(UNORDERED)
    return trace


def join(arrays: list[np.ndarray], where: str) -> np.ndarray:
    """Concatenate along tokens as int32; the rest of the shapes must agree."""
    if (choices := sum(array.size for array in arrays)) > MAX_CHOICES:
        raise DocumentError(f"{where}: {choices:,} choices, at most {MAX_CHOICES:,} are read: import fewer requests")
    for array in arrays:
        if array.ndim != 3 or array.dtype.kind not in "iu" or 0 in array.shape[1:]:
            raise DocumentError(
                f"{where}: expected integers [tokens, layers, top_k], got {array.dtype} {list(array.shape)}"
            )
        if array.size and (array.min() < -1 or array.max() >= MAX_EXPERTS):
            raise DocumentError(f"{where}: names experts {array.min()}..{array.max()}, at most {MAX_EXPERTS} are known")
    first, *others = sorted({array.shape[1:] for array in arrays})
    if others:
        raise DocumentError(f"{where}: [layers, top_k] of {list(first)} and of {list(others[0])}: not one model's")
    return np.concatenate([array.astype(np.int32) for array in arrays])


def _bodies(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path)
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DocumentError(f"{path}: empty")
    try:
        bodies = [(str(path), json.loads(text))]
    except (ValueError, RecursionError) as error:
        if len(lines) == 1 or path.suffix == ".json":
            raise DocumentError(f"{path}: not JSON ({error})") from None
        bodies = []
        for number, line in lines:
            try:
                bodies.append((f"{path}:{number}", json.loads(line)))
            except (ValueError, RecursionError) as broken:
                raise DocumentError(f"{path}:{number}: not JSON ({broken})") from None
    for where, body in bodies:
        several = isinstance(body, list) and body and (isinstance(body[0], dict) or _depth(body) == 4)
        yield from ((f"{where}[{i}]", item) for i, item in enumerate(body)) if several else [(where, body)]


def _answers(body: Any, where: str) -> Iterator[Answer]:
    if isinstance(body, list):
        yield Answer([body], None, where)
        return
    if not isinstance(body, dict):
        raise DocumentError(f"{where}: expected a request's answer, got {show(body)}")
    prompt = [body[PROMPT]] if body.get(PROMPT) is not None else []
    places: list[tuple[str, Any]] = [(where, body)]
    for name in ("outputs", "choices"):
        several = body.get(name)
        if isinstance(several, list):
            places += [(f"{where}.{name}[{i}]", item) for i, item in enumerate(several)]
    for place, item in places:
        if not isinstance(item, dict):
            continue
        meta = item["meta_info"] if isinstance(item.get("meta_info"), dict) else {}
        value = meta.get(FIELD) if item.get(FIELD) is None else item[FIELD]
        if value is not None:
            yield Answer([*prompt, value], _tokens(meta), f"{place}.{FIELD}")
            prompt = []  # several answers share one prompt, which is routed once
    if prompt:
        yield Answer(prompt, None, f"{where}.{PROMPT}")


def _tokens(meta: dict[str, Any]) -> int | None:
    """Tokens that were routed: the last one of an answer never is."""
    counts = [meta.get(name) for name in ("prompt_tokens", "completion_tokens")]
    known = [count for count in counts if type(count) is int and 0 <= count < 2**40]
    return sum(known) - 1 if len(known) == 2 else None


def _whole(answer: Answer) -> np.ndarray:
    """All parts of an answer in one: [tokens, layers, top_k], or flat if that is all they are."""
    parts = [_decode(part, answer.where) for part in answer.parts]
    parts = [part for part in parts if part.size] or parts[:1]
    return np.concatenate(parts) if all(part.ndim == 1 for part in parts) else join(parts, answer.where)


def _decode(part: Any, where: str) -> np.ndarray:
    """[tokens, layers, top_k] of a nested list or an npy in base64; flat int32 of any other base64."""
    if isinstance(part, str):
        try:
            raw = base64.b64decode(part, validate=True)
        except ValueError:
            raise DocumentError(f"{where}: expected base64, got {show(part)}") from None
        if raw.startswith(b"\x93NUMPY"):
            with readable(Path(where), "npy in base64"):
                return np.load(io.BytesIO(raw), allow_pickle=False)
        if not raw or len(raw) % 4:
            raise DocumentError(f"{where}: {len(raw)} bytes of base64 are no int32 array")
        return np.frombuffer(raw, "<i4")
    if not isinstance(part, list):
        raise DocumentError(f"{where}: expected nested lists or base64, got {show(part)}")
    if not part:
        return np.empty((0, 1, 1), np.int32)
    try:
        values = np.array(part)
    except (ValueError, OverflowError, RecursionError):
        raise DocumentError(f"{where}: a ragged list: expected [tokens, layers, top_k]") from None
    if values.ndim != 3 or values.dtype.kind not in "iu":
        kind = "other things than small integers" if values.dtype.kind not in "iu" else f"{values.ndim} dimensions"
        raise DocumentError(f"{where}: expected integers [tokens, layers, top_k], got {kind}")
    return values


def _flat_shape(flat: list[tuple[Answer, np.ndarray]], options: Options, where: str) -> tuple[int, int]:
    """Layers and top_k of arrays without a shape: told, or the one number of layers that fits every answer's tokens."""
    top_k = options.top_k
    if top_k is None:
        raise DocumentError(f"{where}: base64 does not tell its shape: give --top-k")
    if options.layers is not None:
        return options.layers, top_k
    fitting: set[int] | None = None
    for answer, values in flat:
        if answer.tokens is None:
            raise DocumentError(f"{answer.where}: neither its shape nor its tokens are told: give --layers")
        # Some versions also return the answer's last token.
        rows = [tokens * top_k for tokens in (answer.tokens, answer.tokens + 1) if tokens > 0]
        own = {values.size // row for row in rows if values.size % row == 0 and values.size // row <= MAX_LAYERS}
        fitting = own if fitting is None else fitting & own
    if not fitting or len(fitting) > 1:
        found = "no number of layers fits" if not fitting else f"{' or '.join(map(str, sorted(fitting)))} layers fit"
        raise DocumentError(f"{where}: {found} top-{top_k} and the requests' tokens: give --layers")
    return fitting.pop(), top_k


def _depth(value: Any) -> int:
    depth = 0
    while isinstance(value, list) and depth < 5:
        depth, value = depth + 1, value[0] if value else None
    return depth

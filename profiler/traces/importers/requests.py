"""Routed experts that an engine returns with each request's answer, kept as JSON or JSON lines.

- vLLM: ``outputs[i]`` or ``choices[i].routed_experts``, nested lists [tokens, layers, top_k], or base64 of an npy of
  uint8 or uint16 (before 0.33 int16, with the prompt apart as ``prompt_routed_experts``). Every choice of a request
  repeats its prompt. Source: vllm/model_executor/layers/fused_moe/routed_experts_capturer.py, 0.33.0.
- SGLang: ``meta_info.routed_experts`` or ``sglext.routed_experts``, base64 of int32 [tokens, layers, top_k] without its
  shape; every layer of the model, dense ones as zeros; the rows from ``routed_experts_start_len`` to the token before
  the last. Source: sglang/srt/managers/scheduler_components/batch_result_processor.py, 0.5.23.

A bare nested list is one request, a list of them several. Engines clear their buffers with zeros, so a token's row of
zeros was not recorded (the last token of an answer is never routed, cached ones may be missing).
"""

import base64
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....spec.document import show
from ....spec.errors import DocumentError
from ....spec.model import MAX_EXPERTS
from ....spec.trace import MAX_CHOICES, Trace
from .files import readable
from .flat import flat_shape
from .json_files import ACCEPTED, depth_of, found
from .options import Options
from .prompts import count_prompt_once
from .records import UNORDERED, limit_choices, tokens_trace

FIELD = "routed_experts"
PROMPT = "prompt_routed_experts"
START = "routed_experts_start_len"
NPY_IN_BASE64 = "k05VTVBZ"
OF_A_REQUEST = {"text", "meta_info", "choices", "outputs", "prompt", "prompt_token_ids", "usage", "request_id"}


@dataclass
class Answer:
    """One answer.

    rows: [tokens, layers, top_k], or flat where the record has no shape. Then what the engine tells of it, None where
    it does not: prompt and completion tokens, tokens whose rows were left out at the start.
    """

    rows: np.ndarray
    where: str
    prompt: int | None = None
    completion: int | None = None
    start: int | None = None


def answers_of(bodies: Iterable[tuple[str, Any]], notes: list[str], where: str) -> list[Answer]:
    """Every answer with routed experts, the prompt of a request's choices once; ``where`` names the file."""
    answers: list[Answer] = []
    seen, of_a_request, choices, size = "", False, 0, 0
    for place, body in bodies:
        seen = seen or found(body)
        for name, item in _requests(body, place):
            of_a_request |= isinstance(item, dict) and not OF_A_REQUEST.isdisjoint(item)
            own = list(_answers(item, name))
            choices += len(own) if len(own) > 1 and count_prompt_once(own, item, notes) else 0
            answers += own
            size += sum(answer.rows.size for answer in own)
            limit_choices(0, size, where)
    if not answers and of_a_request:
        raise DocumentError(f"{where}: no request has {FIELD}: start the engine with --enable-return-routed-experts")
    if not answers:
        raise DocumentError(f"{where}: holds {seen}: no recording of routing. {ACCEPTED}")
    if choices:
        notes.append(f"{choices} choices repeat the prompt of their request: each prompt is counted once")
    return answers


def is_flat(body: Any) -> bool | None:
    """Whether a document's first answer is base64 of bare integers, as SGLang's; None where it has no answer."""
    for name, item in _requests(body, ""):
        for part in _parts(item, name):
            return isinstance(part, str) and not part.startswith(NPY_IN_BASE64)
    return None


def answers_trace(answers: list[Answer], notes: list[str], *, options: Options, where: str, source: str) -> Trace:
    """A sequence per answer."""
    flat = [answer for answer in answers if answer.rows.ndim == 1]
    if flat:
        layers, top_k = flat_shape(flat, options, where, notes)
        for answer in flat:
            answer.rows = answer.rows.reshape(-1, layers, top_k)
    return requests_trace([a.rows for a in answers], notes, options=options, where=where, source=source)


def requests_trace(arrays: list[np.ndarray], notes: list[str], *, options: Options, where: str, source: str) -> Trace:
    """A sequence per request, each [tokens, layers, top_k] integers."""
    full = [array for array in arrays if len(array)]
    if len(full) < len(arrays):
        notes.append(f"{len(arrays) - len(full)} requests without a token: dropped")
    if not full:
        raise DocumentError(f"{where}: zero requests with tokens")
    limit_choices(sum(len(array) for array in full), sum(array.size for array in full), where)
    ids = join(full, where)
    lengths = np.array([len(array) for array in full])
    trace = tokens_trace(ids, lengths, notes, options=options, where=where, source=source, zero_is_empty=True)
    if not trace.counts_only:
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


def _requests(body: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The requests of a document: the items of a list of answers, else itself."""
    several = isinstance(body, list) and body and (isinstance(body[0], dict) or depth_of(body) == 4)
    yield from ((f"{where}[{i}]", item) for i, item in enumerate(body)) if several else [(where, body)]


def _places(body: dict[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where an answer can be: the document itself, SGLang's extension of OpenAI's format, each choice."""
    yield where, body
    if isinstance(body.get("sglext"), dict):
        yield f"{where}.sglext", body["sglext"]
    for name in ("outputs", "choices"):
        if isinstance(body.get(name), list):
            for i, item in enumerate(body[name]):
                if isinstance(item, dict):
                    yield f"{where}.{name}[{i}]", item


def _value(item: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    meta = item["meta_info"] if isinstance(item.get("meta_info"), dict) else {}
    return (meta.get(FIELD) if item.get(FIELD) is None else item[FIELD]), meta


def _parts(body: Any, where: str) -> Iterator[Any]:
    """Whatever is routed experts in a request, not decoded."""
    if isinstance(body, list):
        yield body
    if isinstance(body, dict):
        if body.get(PROMPT) is not None:
            yield body[PROMPT]
        yield from (value for _, item in _places(body, where) if (value := _value(item)[0]) is not None)


def _answers(body: Any, where: str) -> Iterator[Answer]:
    if isinstance(body, list):
        yield Answer(_decode(body, where), where)
        return
    if not isinstance(body, dict):
        raise DocumentError(f"{where}: expected a request's answer, got {show(body)}. {ACCEPTED}")
    prompt = [_decode(body[PROMPT], f"{where}.{PROMPT}")] if body.get(PROMPT) is not None else []
    usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
    single = sum(_value(item)[0] is not None for _, item in _places(body, where)) == 1
    for place, item in _places(body, where):
        value, meta = _value(item)
        if value is None:
            continue
        told = meta if meta else usage if single else {}
        start = next((size for holder in (meta, item, body) if (size := _size(holder, START)) is not None), None)
        rows = _whole([*prompt, _decode(value, f"{place}.{FIELD}")], f"{place}.{FIELD}")
        yield Answer(rows, f"{place}.{FIELD}", _size(told, "prompt_tokens"), _size(told, "completion_tokens"), start)
        prompt = []  # several answers share one prompt, which is routed once
    if prompt:
        yield Answer(prompt[0], f"{where}.{PROMPT}")


def _size(holder: dict[str, Any], name: str) -> int | None:
    """A number of tokens, where the holder tells one."""
    value = holder.get(name)
    return value if type(value) is int and 0 <= value < 2**40 else None


def _whole(parts: list[np.ndarray], where: str) -> np.ndarray:
    """All parts of an answer in one: [tokens, layers, top_k], or flat if that is all they are."""
    parts = [part for part in parts if part.size] or parts[:1]
    if all(part.ndim == 1 for part in parts):
        return np.concatenate(parts)
    return join(parts, where) if len(parts) > 1 else parts[0]


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
    return values.astype(np.int32) if abs(values).max(initial=0) < 2**31 else values

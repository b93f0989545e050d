"""One row per token, or per token and layer: JSON lines or a JSON list that people write from their own hooks.

- a token: lists [layers][top_k], or an object with such lists under one of the names in EXPERTS, and perhaps gate
  weights of the same shape under one of WEIGHTS, or an object of layers: ``{"0": [3, 1], "1": [0, 2]}``.
- a token and layer: an object with ``token``, ``layer`` and experts [top_k].
- a flat list of layers x top_k ids per token: only with --layers or --model.

Rows are in order of tokens; ``sequence`` or ``request`` (SEQUENCES) divides them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from ....spec.document import show
from ....spec.errors import DocumentError
from ....spec.model import MAX_EXPERTS
from ....spec.trace import Trace
from .files import natural
from .json_files import depth_of, found, read_bodies
from .options import Options
from .records import UNORDERED, limit_choices, tokens_trace

EXPERTS = ("experts", "expert_ids", "routed_experts", "selected_experts", "topk_ids", "top_k_index", "top_indices")
WEIGHTS = ("weights", "expert_weights", "gate_weights", "routing_weights", "topk_weights", "top_k_weights")
TOKENS = ("token", "token_index", "token_idx", "position", "pos")
LAYERS = ("layer", "layer_id", "layer_idx")
SEQUENCES = ("sequence", "seq", "seq_id", "request", "request_id", "rid", "id")
SOURCE = "rows of tokens"


@dataclass
class Rows:
    """What was read: per token an array [layers, top_k], and the sequence that it belongs to."""

    ids: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    sequences: list[Any] = field(default_factory=list)
    layers: list[int] | None = None  # the record's own numbers


def recognise(body: Any) -> bool:
    """Whether a line of JSON is a row."""
    if isinstance(body, list):
        return depth_of(body) == 2 and type(body[0][0] if body[0] else None) is int
    if not isinstance(body, dict):
        return False
    name = _one(body, EXPERTS)
    if name is not None:
        depth = depth_of(body[name])
        return depth == 2 or (depth == 1 and (_one(body, TOKENS) is not None or name != "routed_experts"))
    return bool(body) and _by_layer(body) is not None


def read(path: Path, options: Options) -> tuple[Trace, list[str]]:
    """A file of JSON lines, or a JSON list of rows."""
    notes: list[str] = []
    rows = _read(_flattened(read_bodies(path)), path, options)
    ids = np.stack(rows.ids)
    weights = np.stack(rows.weights) if rows.weights else None
    if weights is not None:
        order = np.argsort(-weights, axis=2, kind="stable")
        ids, weights = np.take_along_axis(ids, order, axis=2), np.take_along_axis(weights, order, axis=2)
    lengths = np.array([len(list(group)) for _, group in groupby(rows.sequences)])
    trace = tokens_trace(
        ids, lengths, notes, options=options, where=str(path), source=SOURCE, weights=weights, layer_numbers=rows.layers
    )
    layers, top_k = ids.shape[1:]
    notes.append(f"rows taken for one token each, {layers} layers x top-{top_k}")
    if all(sequence is None for sequence in rows.sequences):
        notes.append(f"no {SEQUENCES[0]} in the rows: taken for one sequence")
    if weights is None:
        notes.append(UNORDERED)
    return trace, notes


def _flattened(bodies: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Rows of a JSON list one by one."""
    iterator = iter(bodies)
    where, first = next(iterator)
    rest = next(iterator, None)
    if rest is None and isinstance(first, list) and (depth_of(first) == 3 or (first and isinstance(first[0], dict))):
        yield from ((f"{where}[{i}]", row) for i, row in enumerate(first))
        return
    yield from chain([(where, first)], [] if rest is None else [rest], iterator)


def _read(bodies: Iterator[tuple[str, Any]], path: Path, options: Options) -> Rows:
    rows, size = Rows(), 0
    where, first = next(bodies, ("", None))
    bodies = chain([(where, first)], bodies)
    by_layer = isinstance(first, dict) and _one(first, LAYERS) is not None and _one(first, TOKENS) is not None
    shape: tuple[int, ...] | None = None
    for where, layers, sequence, ids, weights in (_of_layers if by_layer else _of_tokens)(bodies, options):
        if shape is not None and (
            ids.shape != shape or layers != rows.layers or bool(rows.weights) != (weights is not None)
        ):
            raise DocumentError(f"{where}: {list(ids.shape)} beside {list(shape)}: rows must agree in layers and top-k")
        shape, rows.layers = ids.shape, layers
        rows.ids.append(ids)
        rows.sequences.append(sequence)
        if weights is not None:
            rows.weights.append(weights)
        size += ids.size
        limit_choices(len(rows.ids), size, str(path))
    if not rows.ids:
        raise DocumentError(f"{path}: no rows")
    return rows


Row = tuple[str, list[int] | None, Any, np.ndarray, np.ndarray | None]


def _of_tokens(bodies: Iterator[tuple[str, Any]], options: Options) -> Iterator[Row]:
    for where, body in bodies:
        layers = None
        value, weights, sequence = body, None, None
        if isinstance(body, dict):
            sequence = _sequence(body)
            name, weighted = _one(body, EXPERTS), _one(body, WEIGHTS)
            split = None if name is not None else _by_layer(body)
            if name is None and split is None:
                raise DocumentError(f"{where}: holds {found(body)}: expected experts under {', '.join(EXPERTS)}")
            layers, value = split if split is not None else (None, body[name])
            weights = None if weighted is None else body[weighted]
        ids = _array(value, where, options)
        yield where, layers, sequence, ids, _weights(weights, ids, where)


def _of_layers(bodies: Iterator[tuple[str, Any]], options: Options) -> Iterator[Row]:
    """Rows of one token and layer each; a token's rows stand together."""

    def key(item: tuple[str, Any]) -> tuple[Any, Any]:
        where, body = item
        token = _one(body, TOKENS) if isinstance(body, dict) else None
        if token is None or _one(body, LAYERS) is None or _one(body, EXPERTS) is None:
            raise DocumentError(f"{where}: holds {found(body)}: expected token, layer and experts, as in the first row")
        return _sequence(body), show(body[token])

    for (sequence, _), group in groupby(bodies, key):
        layers: dict[int, tuple[list[Any], Any]] = {}
        where = ""
        for where, body in group:
            number = body[_one(body, LAYERS) or ""]
            if type(number) is not int or number < 0 or number in layers:
                raise DocumentError(
                    f"{where}: layer {show(number)}: expected each layer of a token once, its rows together"
                )
            weighted = _one(body, WEIGHTS)
            layers[number] = body[_one(body, EXPERTS) or ""], body[weighted] if weighted else None
        order = sorted(layers)
        ids = _array([layers[number][0] for number in order], where, Options())
        weights = [layers[number][1] for number in order]
        yield where, order, sequence, ids, _weights(None if weights[0] is None else weights, ids, where)


def _one(body: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in body), None)


def _sequence(body: dict[str, Any]) -> Any:
    name = _one(body, SEQUENCES)
    return None if name is None else show(body[name])


def _by_layer(body: dict[str, Any]) -> tuple[list[int], list[Any]] | None:
    """Numbers and lists of an object whose keys are layers."""
    inner = body["layers"] if isinstance(body.get("layers"), dict) else body
    lists = {key: value for key, value in inner.items() if isinstance(value, list)}
    names = sorted(lists, key=natural)
    numbers = [name.rpartition("_")[2].rpartition(".")[2].removeprefix("layer") for name in names]
    if not names or not all(number.isdecimal() and len(number) < 10 for number in numbers):
        return None
    return [int(number) for number in numbers], [lists[name] for name in names]


def _array(value: Any, where: str, options: Options) -> np.ndarray:
    """Ids [layers, top_k] int32 of a token."""
    try:
        ids = np.array(value)
    except (ValueError, OverflowError, RecursionError):
        raise DocumentError(f"{where}: a ragged list: expected [layers, top_k]") from None
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or 0 in ids.shape:
        raise DocumentError(f"{where}: expected integers [layers, top_k], got {show(value)}")
    if ids.min() < -1 or ids.max() >= MAX_EXPERTS:
        raise DocumentError(f"{where}: names experts {ids.min()}..{ids.max()}, at most {MAX_EXPERTS} are known")
    if ids.ndim == 1:
        layers = options.layers or (options.model.expert_layers if options.model else None)
        if layers is None:
            raise DocumentError(
                f"{where}: a flat list of {ids.size} experts does not tell layers and top-k: give --layers or --model"
            )
        if ids.size % layers:
            raise DocumentError(f"{where}: {ids.size} experts are no multiple of {layers} layers")
        ids = ids.reshape(layers, -1)
    return ids.astype(np.int32)


def _weights(value: Any, ids: np.ndarray, where: str) -> np.ndarray | None:
    if value is None:
        return None
    try:
        weights = np.array(value, np.float64)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise DocumentError(f"{where}: weights: expected numbers {list(ids.shape)}") from None
    if weights.size != ids.size or not np.isfinite(weights).all():
        raise DocumentError(f"{where}: weights: expected finite numbers {list(ids.shape)}, got {list(weights.shape)}")
    return weights.reshape(ids.shape).astype(np.float32)

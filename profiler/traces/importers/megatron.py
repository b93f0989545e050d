"""Megatron-Core's router trace: JSON lines ``router_trace_rank{r}.jsonl`` in the folder of --moe-routing-trace-path.

A line is one call of one router: ``{"step", "stage": "pre_dispatch", "block": "decoder" | "mtp", "layer", "rank",
"num_tokens", "topk", "top_indices": [num_tokens][topk]}``, ids ascending where the router gives a mask. Microbatches of
a step follow each other in calls of the same layer; recomputed activations call a router twice. Layers are numbered
within a pipeline stage, and the lines do not name the stage.
Source: megatron/core/transformer/moe/router_trace.py, 0.19.2.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ....spec.document import show
from ....spec.errors import DocumentError
from ....spec.model import MAX_EXPERTS
from ....spec.trace import Trace
from .files import recording
from .json_files import found, read_bodies
from .options import Options
from .ranks import Record, merge_ranks
from .records import UNORDERED, limit_choices, ranges, tokens_trace

FIELDS = ("step", "layer", "top_indices")
SOURCE = "Megatron-Core router trace"

Calls = dict[tuple[int, int], dict[int, list[np.ndarray]]]  # (rank, step) -> layer -> ids [tokens, top_k] of each call


def recognise(body: Any) -> bool:
    """Whether a line of JSON is a call of a router."""
    return isinstance(body, dict) and all(name in body for name in FIELDS)


def read(path: Path, options: Options) -> tuple[Trace, list[str]]:
    """One rank's file, or the folder with all of them."""
    notes: list[str] = []
    calls, layers = _read_calls(path, notes)
    if len({tuple(sorted(step)) for step in calls.values()}) > 1:
        raise DocumentError(
            f"{path}: ranks or steps with different layers (pipeline stages?): import one stage's files"
        )
    records = [record for place, step in sorted(calls.items()) for record in _microbatches(place, step, layers, path)]
    kept = merge_ranks(records, str(path), notes)
    joined = len({record.rank for record in kept})
    if joined > 1 and options.layers is None and (options.model is None or options.model.expert_layers is None):
        raise DocumentError(
            f"{path}: {joined} ranks hold different routing: of other tokens or of other pipeline stages, whose layers "
            "have the same numbers: give --layers (layers with experts in the model) or --model, or import one rank"
        )
    if joined > 1:
        notes.append(f"{len(layers)} layers are all of the model's: so the ranks are of one pipeline stage")
    elif options.layers is None and options.model is None:
        notes.append(
            f"{len(layers)} layers, all of one pipeline stage: --layers or --model checks that it is the model"
        )
    ids = np.concatenate([record.values for record in kept])
    lengths = np.array([len(record.values) for record in kept])
    trace = tokens_trace(ids, lengths, notes, options=options, where=str(path), source=SOURCE, layer_numbers=layers)
    notes.append(f"{len(kept)} microbatches or forward passes, each taken for one sequence")
    if not trace.counts_only:
        notes.append(UNORDERED)
    return trace, notes


def _read_calls(path: Path, notes: list[str]) -> tuple[Calls, list[int]]:
    """Every call of a decoder's router, and the layers' numbers."""
    calls: Calls = defaultdict(lambda: defaultdict(list))
    layers: set[int] = set()
    seen: set[tuple[int, int, int, bytes]] = set()
    skipped = repeated = size = 0
    for file in recording(path, (".jsonl",)):
        for where, body in read_bodies(file):
            if not recognise(body):
                raise DocumentError(f"{where}: holds {found(body)}: no router trace ({', '.join(FIELDS)})")
            if body.get("block", "decoder") != "decoder":
                skipped += 1
                continue
            step, layer, rank = (_integer(body, name, where) for name in ("step", "layer", "rank"))
            ids = _indices(body, where)
            # A call of many tokens that is repeated whole is a recomputed one.
            call = rank, step, layer, hashlib.sha256(ids.tobytes()).digest()
            if len(ids) > 1 and call in seen:
                repeated += 1
                continue
            seen.add(call)
            calls[rank, step][layer].append(ids)
            layers.add(layer)
            size += ids.size
            limit_choices(0, size, str(path))
    if not calls:
        raise DocumentError(f"{path}: no call of a decoder's router")
    if skipped:
        notes.append(f"{skipped} calls of multi-token-prediction layers: dropped")
    if repeated:
        notes.append(f"{repeated} calls equal an earlier one of their step (recomputed activations): counted once")
    return calls, sorted(layers)


def _microbatches(
    place: tuple[int, int], step: dict[int, list[np.ndarray]], layers: list[int], path: Path
) -> Iterator[Record]:
    """Calls of a step, one for each microbatch in which every layer routed the same tokens."""
    rank, number = place
    shapes = {tuple(ids.shape for ids in step[layer]) for layer in layers}
    if len(shapes) > 1:
        raise DocumentError(
            f"{path}: rank {rank}, step {number}: layers {ranges(layers)} did not route the same tokens as often "
            "(a trace cut off, or virtual pipeline stages): import the other steps"
        )
    for i, together in enumerate(zip(*(step[layer] for layer in layers), strict=True)):
        values = np.stack(together, axis=1)
        identity = hashlib.sha256(values.tobytes()).digest() if len(values) else b""
        yield Record(number, rank, f"{i:09}", values, identity)


def _indices(body: dict[str, Any], where: str) -> np.ndarray:
    """[tokens, top_k] int32, of the shape that the line tells."""
    try:
        ids = np.array(body["top_indices"])
    except (ValueError, OverflowError, RecursionError):
        raise DocumentError(f"{where}: top_indices: a ragged list: expected [num_tokens][topk]") from None
    tokens, top_k = (_integer(body, name, where) for name in ("num_tokens", "topk"))
    if tokens == 0 and ids.size == 0:
        return np.empty((0, top_k), np.int32)
    if ids.dtype.kind not in "iu" or ids.shape != (tokens, top_k):
        raise DocumentError(
            f"{where}: top_indices: expected integers [{tokens}, {top_k}], got {ids.dtype} {list(ids.shape)}"
        )
    if ids.min() < -1 or ids.max() >= MAX_EXPERTS:
        raise DocumentError(f"{where}: names experts {ids.min()}..{ids.max()}, at most {MAX_EXPERTS} are known")
    return ids.astype(np.int32)


def _integer(body: dict[str, Any], name: str, where: str) -> int:
    value = body.get(name)
    if type(value) is not int or not 0 <= value < 2**40:
        raise DocumentError(f"{where}: {name}: expected a whole number, got {show(value)}")
    return value

"""The neutral npz: moeplan's own Trace, or only ``expert_ids`` or only ``expert_counts`` that someone recorded.

Looser than a Trace: ids [tokens, layers] for top-1, counts [steps, layers, experts] to be summed, gate weights in any
order. What is not an engine's is not guessed at: -1, or an expert named twice, is an error here.
"""

from pathlib import Path

import numpy as np

from ....spec.document import show
from ....spec.errors import DocumentError
from ....spec.model import MAX_EXPERTS
from ....spec.trace import Trace
from .counts import summed
from .files import read_npz
from .options import Options, agree
from .records import COUNTS_ONLY, agree_with_model, check_shape, limit_counts, tokens_trace

FIELDS = {"expert_ids", "expert_weights", "seq_len", "num_experts", "model", "source", "expert_counts"}


def read(path: Path, options: Options) -> tuple[Trace, list[str]]:
    """An npz with expert_ids [tokens, layers, top_k] or expert_counts [layers, experts]."""
    arrays = read_npz(path)
    notes = [f"{show(name)}: not a field of a trace, dropped" for name in sorted(set(arrays) - FIELDS)]
    model, source = (_text(arrays.get(name), f"{path}: {name}") for name in ("model", "source"))
    told = _number(arrays.get("num_experts"), f"{path}: num_experts")
    if told is not None and told != (options.num_experts or told) + (options.zero_experts or 0):
        agree("num-experts", told, options.num_experts, str(path))
    experts = options.num_experts if told is None else told
    if "expert_ids" not in arrays:
        if "expert_counts" not in arrays:
            raise DocumentError(f"{path}: holds neither expert_ids nor expert_counts")
        return _counted(arrays["expert_counts"], experts, notes, options, str(path), model=model, source=source)
    if "expert_counts" in arrays:
        notes.append("expert_counts beside expert_ids: dropped, they are counted again")
    ids, weights = arrays["expert_ids"], arrays.get("expert_weights")
    if ids.ndim == 2:
        notes.append("expert_ids [tokens, layers]: taken for top-1")
        ids = ids[:, :, None]
        weights = weights[:, :, None] if weights is not None and weights.ndim == 2 else weights
    if ids.ndim == 3 and ids.dtype.kind in "iu" and ids.size:
        check_shape(ids, options, str(path))
        if options.zero_experts and options.num_experts is not None and int(ids.max()) >= options.num_experts:
            if int(ids.min()) < 0:
                raise DocumentError(f"{path}: expert_ids: must not be negative, found {int(ids.min())}")
            lengths = np.array([len(ids)])  # only counts remain
            return tokens_trace(ids, lengths, notes, options=options, where=str(path), source=source), notes
    if experts is None and ids.dtype.kind in "iu" and ids.size:
        experts = int(ids.max()) + 1
        notes.append(f"num_experts is not told: the highest number seen gives {experts}")
    if ids.ndim == 3 and ids.size:
        limit_counts(ids.shape[1], min(experts or 1, MAX_EXPERTS), str(path))
    trace = Trace.of(
        ids,
        experts or 1,
        expert_weights=weights,
        seq_len=arrays.get("seq_len"),
        model=model or options.model_name,
        source=source,
        where=str(path),
    )
    agree("top-k", trace.top_k, options.top_k, str(path))
    agree_with_model(trace.layers, options, str(path))
    if weights is None:
        notes.append("no expert_weights: taken for even; the first expert may not be the heaviest")
    if "seq_len" not in arrays:
        notes.append("no seq_len: taken for one sequence")
    if (np.diff(trace.expert_weights, axis=2) > 0).any():
        order = np.argsort(-trace.expert_weights, axis=2, kind="stable")
        notes.append("experts reordered: the highest gate weight first")
        trace = Trace.of(
            np.take_along_axis(trace.expert_ids, order, axis=2),
            trace.num_experts,
            expert_weights=np.take_along_axis(trace.expert_weights, order, axis=2),
            seq_len=trace.seq_len,
            model=trace.model,
            source=source,
        )
    notes.insert(0, f"per-token routing: {trace.tokens} tokens in {len(trace.seq_len)} sequences, top-{trace.top_k}")
    return trace, notes


def _counted(
    value: np.ndarray, experts: int | None, notes: list[str], options: Options, where: str, *, model: str, source: str
) -> tuple[Trace, list[str]]:
    counts, steps = summed(value, f"{where}: expert_counts")
    if steps is not None:
        notes.append(f"expert_counts of {steps} steps: summed")
    if experts not in (None, counts.shape[1]):
        raise DocumentError(f"{where}: expert_counts of {counts.shape[1]} experts, num_experts is {experts}")
    check_shape(counts, options, where)
    agree_with_model(len(counts), options, where)
    trace = Trace.of_counts(counts, model=model or options.model_name, source=source, where=where)
    return trace, [COUNTS_ONLY, *notes]


def _number(value: np.ndarray | None, where: str) -> int | None:
    if value is None:
        return None
    if value.size != 1 or value.dtype.kind not in "iu" or not 1 <= int(value.reshape(())) <= MAX_EXPERTS:
        raise DocumentError(f"{where}: expected one integer in 1..{MAX_EXPERTS}")
    return int(value.reshape(()))


def _text(value: np.ndarray | None, where: str) -> str:
    if value is None:
        return ""
    if value.size != 1 or value.dtype.kind != "U" or value.dtype.itemsize > 4096:
        raise DocumentError(f"{where}: expected one text of at most 1024 characters")
    return str(value.reshape(())[()])

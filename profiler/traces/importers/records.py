"""From an engine's record to a Trace: what every importer does once it holds arrays, and the notes on it.

Shape letters: L layers, E experts, T tokens, K top-k.
"""

from collections.abc import Sequence

import numpy as np

from ....spec.errors import DocumentError
from ....spec.model import MAX_EXPERTS, MAX_LAYERS
from ....spec.trace import MAX_CHOICES, Trace
from .options import Options, agree

COUNTS_ONLY = "counts only: they serve balance; affinity between layers needs a per-token recording"
UNORDERED = (
    "gate weights are not recorded and the order of a token's experts is not promised: weights are even, and the "
    "first expert, which top-1 affinity looks at, may not be the heaviest"
)
MAX_TOKENS = 2**22
MAX_COUNTS = 2**24  # layers x experts
MAX_COUNT = 2.0**53  # the largest count whose sums are exact


def tokens_trace(
    ids: np.ndarray,
    lengths: np.ndarray,
    notes: list[str],
    *,
    options: Options,
    where: str,
    source: str,
    num_experts: int | None = None,
    weights: np.ndarray | None = None,
    zero_is_empty: bool = False,
    layer_numbers: Sequence[int] | None = None,
) -> Trace:
    """Per-token ids [T, L, K] as a Trace, without padding, layers without experts and tokens that were not recorded.

    lengths: [sequences], summing to T. -1 is padding; with ``zero_is_empty`` (buffers that an engine clears with
    zeros) so is a token's row of zeros, which no real routing to K > 1 experts can be. Where tokens chose zero experts
    (identity experts, which nothing has to hold), counts of the real ones remain.
    """
    check_shape(ids, options, where)
    used = (ids != -1).any(axis=(0, 1))
    ids, weights = ids[:, :, used], None if weights is None else weights[:, :, used]
    width = ids.shape[2]
    empty = (ids == -1).all(axis=2)
    if zero_is_empty and width:
        zeros = (ids == 0).all(axis=2)
        # With one expert per token a zero may be expert 0; only a layer that is nothing else is taken for empty.
        empty |= zeros if width > 1 else zeros & zeros.all(axis=0)
    dense = empty.all(axis=0)
    if dense.all():
        raise DocumentError(f"{where}: no token was recorded")
    kept = _drop_layers(dense, notes, options, where, layer_numbers)
    names = kept if layer_numbers is None else np.asarray(layer_numbers)[kept]
    seen = ~empty[:, kept].any(axis=1)
    if not seen.any():
        raise DocumentError(f"{where}: no token was recorded in every layer")
    if not seen.all():
        notes.append(f"{int((~seen).sum())} of {len(seen)} tokens are padding or not recorded in every layer: dropped")
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        lengths = np.bincount(sequence[seen], minlength=len(lengths))
        lengths = lengths[lengths > 0]
    if not seen.all() or dense.any():
        ids = ids[seen][:, kept]
        weights = None if weights is None else weights[seen][:, kept]
    if (ids == -1).any():
        token, layer = (int(axis[0]) for axis in (ids == -1).any(axis=2).nonzero())
        raise DocumentError(f"{where}: token {token} names fewer than {width} experts in layer {layer} of those kept")
    agree("top-k", width, options.top_k, where)
    experts = _experts(num_experts, options, where, notes, int(ids.max()))
    source = _with_layers(source, names, dense)
    if (ids >= experts).any():
        return _real_experts(ids, experts, notes, where=where, source=source, model=options.model_name)
    limit_counts(ids.shape[1], experts, where)
    trace = Trace.of(
        ids, experts, expert_weights=weights, seq_len=lengths, source=source, model=options.model_name, where=where
    )
    notes.insert(0, f"per-token routing: {trace.tokens} tokens in {len(lengths)} sequences, top-{trace.top_k}")
    return trace


def counts_trace(
    counts: np.ndarray,
    notes: list[str],
    *,
    options: Options,
    where: str,
    source: str,
    layer_numbers: Sequence[int] | None = None,
) -> Trace:
    """Counts [L, E] as a counts-only Trace; rows of zeros are layers without experts."""
    check_shape(counts, options, where)
    experts = counts.shape[1]
    zero = options.zero_experts
    if zero and options.num_experts is not None and experts == options.num_experts + zero:
        experts = options.num_experts
        share = counts[:, experts:].sum() / max(counts.sum(), 1)
        notes.append(f"experts {experts}-{counts.shape[1] - 1} are zero experts, {share:.1%} of the counts: dropped")
        counts = counts[:, :experts]
    agree("num-experts", experts, options.num_experts, where)
    if options.top_k is not None and options.model is None:
        notes.append("counts do not tell top-k: --top-k is not used")
    dense = ~(counts != 0).any(axis=1)
    if dense.all():
        raise DocumentError(f"{where}: every count is zero: nothing was recorded")
    kept = _drop_layers(dense, notes, options, where, layer_numbers)
    totals = counts[kept].sum(axis=1)
    if totals.min() != totals.max():
        notes.append(
            f"layers counted unequally, {totals.min():.0f} to {totals.max():.0f} choices: part was not counted"
        )
    numbers = kept if layer_numbers is None else np.asarray(layer_numbers)[kept]
    source = _with_layers(source, numbers, dense)
    trace = Trace.of_counts(counts[kept], source=source, model=options.model_name, where=where)
    notes.insert(0, COUNTS_ONLY)
    return trace


def add_counts(total: np.ndarray | None, counts: np.ndarray, where: str) -> np.ndarray:
    """Sum as float64, exact below 2^53; refuses negative or infinite counts and another shape."""
    if total is not None and total.shape != counts.shape:
        raise DocumentError(f"{where}: counts {list(counts.shape)} beside {list(total.shape)}: not one model's")
    if counts.size and counts.min() < 0:
        raise DocumentError(f"{where}: a negative count ({counts.min()})")
    if not (counts <= MAX_COUNT).all():  # also no NaN
        raise DocumentError(f"{where}: counts must be finite numbers of at most {MAX_COUNT:g}")
    return counts.astype(np.float64) if total is None else total + counts


def limit_choices(tokens: int, choices: int, where: str) -> None:
    """Refuses what a trace cannot hold in memory, before it is gathered. choices: tokens x layers x top_k."""
    if tokens > MAX_TOKENS or choices > MAX_CHOICES:
        raise DocumentError(
            f"{where}: {tokens} tokens with {choices} choices of experts: at most {MAX_TOKENS} and {MAX_CHOICES}; "
            "import a part of it"
        )


def ranges(numbers: Sequence[int] | np.ndarray) -> str:
    """0, 1, 2, 5 as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def check_shape(array: np.ndarray, options: Options, where: str) -> None:
    """Ids [T, L, K] or counts [L, E]: not empty, within the limits, of the user's number of layers."""
    layers = array.shape[1 if array.ndim == 3 else 0]
    if 0 in array.shape:
        raise DocumentError(f"{where}: an empty record {list(array.shape)}")
    if layers > MAX_LAYERS:
        raise DocumentError(f"{where}: {layers} layers, at most {MAX_LAYERS}")
    if array.ndim == 3:
        limit_choices(len(array), array.size, where)
    else:
        limit_counts(layers, array.shape[1], where)
    agree("layers", layers, options.layers, where)


def agree_with_model(expert_layers: int, options: Options, where: str) -> None:
    """The layers with experts must be as many as the user's model has."""
    model = options.model
    if model is not None and model.expert_layers not in (None, expert_layers):
        raise DocumentError(
            f"{where}: {expert_layers} layers with experts in the record, {model.expert_layers} in {model.name}"
        )


def limit_counts(layers: int, experts: int, where: str) -> None:
    """Refuses more layers x experts than any model has, before they are counted."""
    if layers * experts > MAX_COUNTS:
        raise DocumentError(f"{where}: {layers} layers x {experts} experts: at most {MAX_COUNTS} counts")


def _experts(told: int | None, options: Options, where: str, notes: list[str], highest: int) -> int:
    """The number of real experts, of which the highest id must be one, or a zero expert."""
    zero = options.zero_experts or 0
    if told is not None and told != (options.num_experts or told) + zero:
        agree("num-experts", told, options.num_experts, where)
    experts = told if options.num_experts is None else options.num_experts
    if experts is None and zero:
        raise DocumentError(f"{where}: --zero-experts needs --num-experts: ids at or above it are the zero experts")
    if experts is None:
        experts = highest + 1
        notes.append(f"the record does not tell the number of experts: the highest number seen gives {experts}")
    if experts > MAX_EXPERTS:
        raise DocumentError(f"{where}: {experts} experts, at most {MAX_EXPERTS}")
    if highest >= experts + zero:
        beside = f" and {zero} zero experts" if zero else ""
        raise DocumentError(
            f"{where}: names expert {highest}, but there are {experts}{beside}; if higher ids are identity experts, as "
            f"LongCat's, give --zero-experts {highest + 1 - experts} or more"
        )
    return experts


def _real_experts(ids: np.ndarray, experts: int, notes: list[str], *, where: str, source: str, model: str) -> Trace:
    """Counts of the real experts of ids [T, L, K], where ids at or above ``experts`` are zero experts."""
    zero = ids >= experts
    tokens, layers, width = ids.shape
    limit_counts(layers, int(ids.max()) + 1, where)
    counts = np.stack([np.bincount(ids[:, j].ravel(), minlength=experts)[:experts] for j in range(layers)])
    if not counts.any():
        raise DocumentError(f"{where}: every choice is a zero expert: nothing to place")
    real = width - zero.sum(axis=2)
    notes.append(
        f"{zero.mean():.1%} of the choices are zero experts (ids from {experts} on), which nothing holds: dropped; "
        f"{tokens} tokens use {real.min()} to {real.max()} real experts of top-{width}, so only counts are kept"
    )
    notes.insert(0, COUNTS_ONLY)
    return Trace.of_counts(counts.astype(float), source=source, model=model, where=where)


def _drop_layers(
    dense: np.ndarray, notes: list[str], options: Options, where: str, numbers: Sequence[int] | None = None
) -> np.ndarray:
    """Indices of the layers with experts, as many as the model's where that is known; says which go."""
    names = np.arange(len(dense)) if numbers is None else np.asarray(numbers)
    if dense.any():
        plural = "s" if dense.sum() > 1 else ""
        notes.append(f"layer{plural} {ranges(names[dense])} without experts: dropped")
    kept = (~dense).nonzero()[0]
    agree_with_model(len(kept), options, where)
    return kept


def _with_layers(source: str, kept: np.ndarray, dense: np.ndarray) -> str:
    """Sources name the model's layers where the trace's own numbers differ from them."""
    moved = dense.any() or (kept != np.arange(len(kept))).any()
    return f"{source}; model layers {ranges(kept)}" if moved else source

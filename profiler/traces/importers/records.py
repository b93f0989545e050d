"""From an engine's record to a Trace: what every importer does once it holds arrays, and the words for it.

Shape letters: L layers, E experts, T tokens, K top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ....spec.errors import DocumentError
from ....spec.model import MAX_EXPERTS, MAX_LAYERS
from ....spec.trace import Trace

COUNTS_ONLY = "counts only: they serve balance; affinity between layers needs a per-token recording"
UNORDERED = (
    "gate weights are not recorded and the order of a token's experts is not promised: weights are even, and the "
    "first expert, which top-1 affinity looks at, may not be the heaviest"
)


@dataclass(frozen=True)
class Options:
    """What the user knows and a record may not tell: each is a check where the record tells it too."""

    top_k: int | None = None
    num_experts: int | None = None
    layers: int | None = None


def tokens_trace(
    ids: np.ndarray,
    lengths: np.ndarray,
    notes: list[str],
    *,
    options: Options,
    where: str,
    source: str,
    num_experts: int | None = None,
    zero_is_empty: bool = False,
) -> Trace:
    """Per-token ids [T, L, K] as a Trace, without padding, layers without experts and tokens that were not recorded.

    lengths: [sequences], summing to T. -1 is padding; with ``zero_is_empty`` (buffers that an engine clears with
    zeros) so is a token's row of zeros, which no real routing to K > 1 experts can be.
    """
    _check_shape(ids, options, where)
    ids = ids[:, :, (ids != -1).any(axis=(0, 1))]
    width = ids.shape[2]
    empty = (ids == -1).all(axis=2)
    if zero_is_empty and width:
        zeros = (ids == 0).all(axis=2)
        # With one expert per token a zero may be expert 0; only a layer that is nothing else is taken for empty.
        empty |= zeros if width > 1 else zeros & zeros.all(axis=0)
    dense = empty.all(axis=0)
    if dense.all():
        raise DocumentError(f"{where}: no token was recorded")
    kept = _drop_layers(dense, notes)
    ids, empty = ids[:, kept], empty[:, kept]
    seen = ~empty.any(axis=1)
    if not seen.any():
        raise DocumentError(f"{where}: no token was recorded in every layer")
    if not seen.all():
        notes.append(f"{int((~seen).sum())} of {len(seen)} tokens are padding or not recorded in every layer: dropped")
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        lengths = np.bincount(sequence[seen], minlength=len(lengths))
        ids, lengths = ids[seen], lengths[lengths > 0]
    if (ids == -1).any():
        token, layer = (int(axis[0]) for axis in (ids == -1).any(axis=2).nonzero())
        raise DocumentError(f"{where}: token {token} names fewer than {width} experts in layer {layer} of those kept")
    agree("top-k", width, options.top_k, where)
    experts = _experts(num_experts, options, where)
    if experts is None:
        experts = int(ids.max()) + 1
        notes.append(f"the record does not tell the number of experts: the highest number seen gives {experts}")
    if int(ids.max()) >= experts and experts <= MAX_EXPERTS:
        raise DocumentError(f"{where}: names expert {int(ids.max())}, but there are {experts}")
    trace = Trace.of(ids, experts, seq_len=lengths, source=_with_layers(source, kept, dense), where=where)
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
    _check_shape(counts, options, where)
    _experts(counts.shape[1], options, where)
    if options.top_k is not None:
        notes.append("counts do not tell top-k: --top-k is not used")
    dense = ~(counts != 0).any(axis=1)
    if dense.all():
        raise DocumentError(f"{where}: every count is zero: nothing was recorded")
    kept = _drop_layers(dense, notes, layer_numbers)
    totals = counts[kept].sum(axis=1)
    if totals.min() != totals.max():
        notes.append(
            f"layers counted unequally, {totals.min():.0f} to {totals.max():.0f} choices: part was not counted"
        )
    numbers = kept if layer_numbers is None else np.asarray(layer_numbers)[kept]
    trace = Trace.of_counts(counts[kept], source=_with_layers(source, numbers, dense), where=where)
    notes.insert(0, COUNTS_ONLY)
    return trace


def add_counts(total: np.ndarray | None, counts: np.ndarray, where: str) -> np.ndarray:
    """Sum as float64, exact below 2^53; refuses negative counts and another shape."""
    if total is not None and total.shape != counts.shape:
        raise DocumentError(f"{where}: counts {list(counts.shape)} beside {list(total.shape)}: not one model's")
    if counts.size and counts.min() < 0:
        raise DocumentError(f"{where}: a negative count ({counts.min()})")
    return counts.astype(np.float64) if total is None else total + counts


def ranges(numbers: Sequence[int] | np.ndarray) -> str:
    """0, 1, 2, 5 as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in map(int, numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


def agree(name: str, told: int, given: int | None, where: str) -> None:
    """What the user gave must be what the record tells."""
    if given not in (None, told):
        raise DocumentError(f"{where}: {name} is {told} in the record, --{name} says {given}")


def _check_shape(array: np.ndarray, options: Options, where: str) -> None:
    layers = array.shape[1 if array.ndim == 3 else 0]
    if 0 in array.shape:
        raise DocumentError(f"{where}: an empty record {list(array.shape)}")
    if layers > MAX_LAYERS:
        raise DocumentError(f"{where}: {layers} layers, at most {MAX_LAYERS}")
    agree("layers", layers, options.layers, where)


def _experts(told: int | None, options: Options, where: str) -> int | None:
    if told is not None:
        agree("num-experts", told, options.num_experts, where)
    experts = options.num_experts if told is None else told
    if experts is not None and experts > MAX_EXPERTS:
        raise DocumentError(f"{where}: {experts} experts, at most {MAX_EXPERTS}")
    return experts


def _drop_layers(dense: np.ndarray, notes: list[str], numbers: Sequence[int] | None = None) -> np.ndarray:
    """Indices of the layers with experts; says which go."""
    names = np.arange(len(dense)) if numbers is None else np.asarray(numbers)
    if dense.any():
        plural = "s" if dense.sum() > 1 else ""
        notes.append(f"layer{plural} {ranges(names[dense])} without experts: dropped")
    return (~dense).nonzero()[0]


def _with_layers(source: str, kept: np.ndarray, dense: np.ndarray) -> str:
    """Sources name the model's layers where the trace's own numbers differ from them."""
    moved = dense.any() or (kept != np.arange(len(kept))).any()
    return f"{source}; model layers {ranges(kept)}" if moved else source

"""Imbalance: what each device has to compute in steps of so many tokens, under a placement, from recorded routing.

A prefill step takes neighbouring tokens, whole prompts where they fit; a decode step one token of each of many
sequences, which are independent. Both are drawn from a part of the trace that the placement was not fitted on.
"""

# B batches, T tokens, L layers, E experts, K top-k, G devices

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...spec.placement import PlacementLayer
from ...spec.trace import Trace

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, eq=False)
class Loads:
    """Of every batch, layer and device.

    pairs: [B, L, G] (token, expert) pairs that the device computes. active: [B, L, G] experts of it that get a token,
    in expectation where copies share an expert's tokens.
    """

    pairs: np.ndarray
    active: np.ndarray

    @property
    def hottest(self) -> np.ndarray:
        """[B, L] pairs of the hottest device over the mean; 1 is perfect."""
        mean = self.pairs.mean(axis=2)
        return np.where(mean > 0, self.pairs.max(axis=2) / np.where(mean > 0, mean, 1.0), 1.0)


def batch_counts(trace: Trace, tokens: int, batches: int, phase: Phase, seed: int = 0) -> np.ndarray:
    """[B, L, E] int64 pairs of each expert in steps of ``tokens`` tokens.

    Where the trace has fewer tokens than a step, whole copies of it and a part of one more make a step.
    """
    random = np.random.default_rng(seed)
    experts, layers = trace.num_experts, trace.layers
    cell = trace.expert_ids.astype(np.int64) + np.arange(layers)[:, None] * experts
    taken = trace.expert_ids >= 0  # -1: identity experts, which nobody computes
    found = np.empty((batches, layers, experts), np.int64)
    for b in range(batches):
        row = _drawn(trace.tokens, tokens, phase, random)
        cells = cell[row][taken[row]]
        found[b] = np.bincount(cells, minlength=layers * experts).reshape(layers, experts)
    return found


def loads(counts: np.ndarray, layers: Sequence[PlacementLayer]) -> Loads:
    """What each device has under a placement; counts: [B, L, E] of ``batch_counts``.

    A copy with share s of an expert with c tokens gets one with probability 1 - (1 - s)^c.
    """
    shares = np.stack([layer.share_matrix(counts.shape[2]) for layer in layers])  # [L, E, G]
    pairs = np.einsum("ble,leg->blg", counts.astype(float), shares)
    active = np.zeros_like(pairs)
    for layer, share in enumerate(shares):
        expert, device = np.nonzero(share)
        seen = 1 - (1 - share[expert, device]) ** counts[:, layer, expert]  # [B, copies]
        for b, row in enumerate(seen):
            active[b, layer] = np.bincount(device, row, share.shape[1])
    return Loads(pairs, active)


def _drawn(there: int, wanted: int, phase: Phase, random: np.random.Generator) -> np.ndarray:
    """[wanted] rows of a trace of ``there`` tokens."""
    whole, rest = divmod(wanted, there)
    if phase == "decode":
        last = random.choice(there, rest, replace=False)
    else:
        last = (random.integers(there) + np.arange(rest)) % there
    return np.concatenate([np.tile(np.arange(there), whole), last])

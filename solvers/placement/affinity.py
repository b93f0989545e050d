"""What experts exchange, between adjacent layers and within one: the input of the placement solvers."""

# T tokens, L layers, E experts, K top-k

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

STEPS_PER_EXPERT, MOST_STEPS = 800, 50_000_000  # proposals of each annealing chain
EXACT = 2**22  # counts below this are whole and their sums exact in float32


@dataclass(frozen=True, eq=False)
class Affinity:
    """What experts exchange: transitions [L-1, E, E] between layers, together [L, E, E] symmetric, within a layer."""

    transitions: np.ndarray
    together: np.ndarray

    @classmethod
    def of(cls, transitions: ArrayLike, together: ArrayLike | None = None) -> "Affinity":
        """Validated: finite and not negative; ``together`` symmetric with an empty diagonal, none by default."""
        counts = np.asarray(transitions, float)
        if (
            counts.ndim != 3
            or counts.shape[1] != counts.shape[2]
            or not np.isfinite(counts).all()
            or (counts < 0).any()
        ):
            raise ValueError(f"transitions must be finite, non-negative [L-1, E, E], got {list(counts.shape)}")
        shape = (len(counts) + 1, *counts.shape[1:])
        pairs = np.zeros(shape) if together is None else np.asarray(together, float)
        if pairs.shape != shape or not np.isfinite(pairs).all() or (pairs < 0).any():
            raise ValueError(f"together must be finite, non-negative {list(shape)}, got {list(pairs.shape)}")
        if not np.array_equal(pairs, pairs.transpose(0, 2, 1)) or np.einsum("lee->le", pairs).any():
            raise ValueError("together must be symmetric with an empty diagonal")
        return cls(counts, pairs)

    def cost(self, device_of: np.ndarray, hosts: np.ndarray, device_weight: float, host_weight: float) -> float:
        """Weighted crossings of device_of [L, E]."""
        total = 0.0
        for weight, placed in ((device_weight, device_of), (host_weight - device_weight, hosts[device_of])):
            if weight:
                apart = placed[:-1, :, None] != placed[1:, None, :]
                total += weight * float((self.transitions * apart).sum())
                total += weight * float((self.together * (placed[:, :, None] != placed[:, None, :])).sum()) / 2
        return total

    def between(self) -> tuple[np.ndarray, float]:
        """``_table``, made once for all searches."""
        return self._table

    @cached_property
    def _table(self) -> tuple[np.ndarray, float]:
        """[L, 3, E, E] what each expert exchanges with layers l - 1, l, l + 1, in float32 whole numbers; their unit."""
        layers, experts = len(self.together), self.together.shape[1]
        moves = bool(self.transitions.any())
        of_expert = self.together.sum(2)
        if moves:
            of_expert[1:] += self.transitions.sum(1)
            of_expert[:-1] += self.transitions.sum(2)
        largest = float(of_expert.max(initial=0.0))
        whole = largest < EXACT and all((part == np.round(part)).all() for part in (self.together, self.transitions))
        unit = 1.0 if whole or largest == 0 else largest / EXACT
        table = np.zeros((layers, 3, experts, experts), np.float32)
        for layer in range(layers):  # one after another: no second table of all is held
            table[layer, 1] = np.round(self.together[layer] / unit)
            if moves and layer:
                table[layer, 0] = np.round(self.transitions[layer - 1].T / unit)
            if moves and layer < layers - 1:
                table[layer, 2] = np.round(self.transitions[layer] / unit)
        return table, unit


def pairs(expert_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """[L, E, E] tokens that chose both experts, symmetric with an empty diagonal; expert_ids: [T, L, K], -1: none."""
    layers, top_k = expert_ids.shape[1:]
    found = np.zeros((layers, num_experts**2))
    for layer in range(layers):
        ids = expert_ids[:, layer].astype(np.int64)
        for first in range(top_k):
            one, others = ids[:, first, None], np.delete(ids, first, axis=1)
            cells = (one * num_experts + others)[(one >= 0) & (others >= 0)]
            found[layer] += np.bincount(cells, minlength=num_experts**2)
    return found.reshape(layers, num_experts, num_experts)


def least_by_slots(transitions: np.ndarray, *slots: int) -> list[np.ndarray]:
    """[L-1] tokens that change places at least: an expert keeps its heaviest successors (predecessors), one per slot.

    transitions: [L-1, E, E]; slots: of the largest place, for as many kinds of places as are asked for.
    """
    experts, total = transitions.shape[1], transitions.sum(axis=(1, 2))
    ends = sorted({experts - count for count in slots if count < experts})
    least = [np.zeros(len(transitions)) for _ in slots]
    for row in (transitions, np.ascontiguousarray(transitions.transpose(0, 2, 1))) if ends else ():
        ordered = np.partition(row, ends, axis=2)
        for i, count in enumerate(slots):
            if count < experts:
                least[i] = np.maximum(least[i], total - ordered[:, :, experts - count :].sum(axis=(1, 2)))
    return least


def usual_steps(size: int) -> int:
    """Proposals of an annealing chain for so many layers x experts; ``benchmarks/annealing.py`` shows what more of
    them bring."""
    return min(STEPS_PER_EXPERT * size, MOST_STEPS)

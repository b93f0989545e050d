"""Drift: has routing changed since a reference? A sequential test that may look after every batch.

    counts[b, l, e]    token-expert pairs of batch b in layer l; n[b, l] is their sum
    share[l, e]        of the pairs in one half of the reference's batches, each count with a half more
    (1) distance[b, l] = sum_e (counts[b, l, e] / n[b, l] - share[l, e])^2 / share[l, e]     Pearson's, per pair
    (2) usual[b, l]    = (E - 1) * (1 / n + (1 - 1 / n) * rho[l])     its mean where nothing changed; rho is the
                         overdispersion: tokens of one text want the same experts, so batches differ by more than chance
    (3) score[b]       = mean_l distance / usual
    (4) low[t], high[t] = #{i < t: score[i] > score[t]} / t, #{i <= t: score[i] >= score[t]} / t
                         the rank of a batch among the reference's other half and all batches since, itself included
    (5) factor_k[t]    = (high^k - low^k) / (high - low)            for each k of ``POWERS``: the mean of k p^(k - 1)
                         over p in low..high
        R_k[t]         = (1 + R_k[t - 1]) * factor_k[t]
    (6) evidence       = mean_k R_k[t]
    alarm:               evidence >= between

(4) and (5) are a conformal test in Shiryaev and Roberts' form (Vovk, Gammerman and Shafer, Algorithmic Learning in a
Random World, 2nd ed., chapter 8), its random numbers integrated out. Where batches are exchangeable, with whatever
overdispersion, every rank is equally likely whatever came before. A factor then has mean 1, so that R - t is a
martingale, and the mean number of batches up to a false alarm is at least ``between``. A bad rho costs power, never
that guarantee. What it does not cover: batches that depend on the ones just before them (one long text over many
batches) are not exchangeable.
"""

# B batches, L layers, E experts, K powers

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field

import numpy as np

POWERS = np.array([0.1, 0.2, 0.35, 0.5, 0.7])
"""Small ones gain most from a large change, large ones lose little while nothing changes."""
LEAST_REFERENCE = 4
"""Batches: two to learn the shares from, two to compare with."""


@dataclass(frozen=True, eq=False)
class Reference:
    """share: [L, E] of a layer's pairs; overdispersion: [L] from 0 (multinomial) to 1 (a batch has one expert)."""

    share: np.ndarray
    overdispersion: np.ndarray

    @classmethod
    def of(cls, counts: np.ndarray) -> "Reference":
        """From batches [B, L, E], at least two. Moments: the mean of (1) is that of (2), times 1 - 1 / B as the shares
        are of the same batches."""
        batches = len(counts)
        if counts.ndim != 3 or batches < 2:
            raise ValueError(f"counts must be [2 or more batches, layers, experts], got {list(counts.shape)}")
        share = _shares(counts.sum(axis=0) + 0.5)
        size = np.maximum(counts.sum(axis=2), 1.0)
        excess = _distance(counts, share) / (_freedom(share) * (1 - 1 / batches)) - 1 / size
        found = excess.mean(axis=0) / np.maximum(1 - 1 / size, 1e-9).mean(axis=0)
        return cls(share, np.clip(found, 0.0, 1.0))

    def scores(self, counts: np.ndarray) -> np.ndarray:
        """[B] how far batches [B, L, E] are from the reference, about 1 where nothing changed."""
        size = np.maximum(counts.sum(axis=2), 1.0)
        usual = _freedom(self.share) * (1 / size + (1 - 1 / size) * self.overdispersion)
        return (_distance(counts, self.share) / usual).mean(axis=1)


def _shares(counts: np.ndarray) -> np.ndarray:
    """[..., E] of each layer's pairs; even where there are none."""
    total = counts.sum(axis=-1, keepdims=True)
    return np.where(total > 0, counts / np.where(total > 0, total, 1.0), 1 / counts.shape[-1])


def _distance(counts: np.ndarray, share: np.ndarray) -> np.ndarray:
    """[B, L]; a layer without pairs in a batch is as the reference."""
    there = counts.sum(axis=2) > 0
    return np.where(there, ((_shares(counts) - share) ** 2 / share).sum(axis=2), 0.0)


def _freedom(share: np.ndarray) -> int:
    """E - 1, at least 1: a layer of one expert never changes."""
    return max(share.shape[1] - 1, 1)


@dataclass(eq=False)
class DriftTest:
    """The test after any number of batches.

    between: batches between false alarms, on average at least. known: scores so far, rising. wealth: [K] as in (5).
    growth, onset: [K] the largest product of the factors of (5) over the last batches, and the number of the batch
    before them: where a change would have begun. looks: batches so far.
    """

    reference: Reference
    between: float
    known: list[float]
    wealth: np.ndarray = field(default_factory=lambda: np.zeros(len(POWERS)))
    growth: np.ndarray = field(default_factory=lambda: np.ones(len(POWERS)))
    onset: np.ndarray = field(default_factory=lambda: np.zeros(len(POWERS), np.int64))
    looks: int = 0

    @classmethod
    def of(cls, counts: np.ndarray, between: float) -> "DriftTest":
        """From the reference's batches [B, L, E], at least ``LEAST_REFERENCE``.

        Every second one is what shares are learned from, so that a slow change inside the reference is in both halves.
        """
        if counts.ndim != 3 or len(counts) < LEAST_REFERENCE:
            raise ValueError(f"counts must be [{LEAST_REFERENCE} or more batches, layers, experts], got {counts.shape}")
        reference = Reference.of(counts[::2])
        return cls(reference, between, sorted(reference.scores(counts[1::2]).tolist()))

    def look(self, counts: np.ndarray) -> bool:
        """Whether a further batch [L, E] ends in an alarm."""
        score = float(self.reference.scores(counts[None])[0])
        factor = self._factor(score)
        insort(self.known, score)
        self.looks += 1
        self.wealth = (1 + self.wealth) * factor
        quiet = self.growth <= 1
        self.onset[quiet] = self.looks - 1
        self.growth = np.where(quiet, 1.0, self.growth) * factor
        return self.evidence >= self.between

    @property
    def evidence(self) -> float:
        """(6): its mean is the number of batches where nothing changes."""
        return float(self.wealth.mean())

    @property
    def changed(self) -> int:
        """Batches since a change most likely began, at least 1 once there is one."""
        return max(self.looks - int(self.onset[self.growth.argmax()]), min(self.looks, 1))

    def _factor(self, score: float) -> np.ndarray:
        """[K] the factors of (5) for the next batch."""
        above = len(self.known) - bisect_right(self.known, score)
        equal = bisect_right(self.known, score) - bisect_left(self.known, score)
        low, high = above / (len(self.known) + 1), (above + equal + 1) / (len(self.known) + 1)
        return (high**POWERS - low**POWERS) / (high - low)

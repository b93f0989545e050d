"""Scores of a placement on a trace: balance, crossings between layers, fan-out."""

# W windows, T tokens, L layers, E experts, K top-k, G devices

from collections.abc import Sequence

import numpy as np

from ...solvers.slots import Slots
from ...spec.balance import balance as balance_of
from ...spec.placement import PlacementDevice, PlacementLayer, Score
from ...spec.trace import Trace

SEED = 0  # of the draws of copies


def score(layers: Sequence[PlacementLayer], devices: Sequence[PlacementDevice], trace: Trace) -> Score:
    """Score on every token of ``trace``, or on its counts.

    Devices count with their speeds in the balance. Which copy of a replicated expert serves a token is drawn by the
    shares, each choice by itself (seeded); boundaries are scored only where every expert has one copy.
    """
    return Scorer(layers, devices, trace.num_experts).on(trace)


class Scorer:
    """A placement, ready to be scored on several traces of ``num_experts`` experts; see ``score``."""

    def __init__(self, layers: Sequence[PlacementLayer], devices: Sequence[PlacementDevice], num_experts: int) -> None:
        names = sorted({device.host for device in devices})
        self.speed = np.array([device.speed for device in devices])
        self.host_of = np.array([names.index(device.host) for device in devices])
        self.shares = [layer.share_matrix(num_experts) for layer in layers]
        self.single = all((s > 0).sum() == num_experts for s in self.shares)

    def on(self, trace: Trace) -> Score:
        """Its score there."""
        loads = zip(trace.expert_counts, self.shares, strict=True)
        balance = np.array([balance_of(counts @ shares, self.speed) for counts, shares in loads])
        mean, largest = float(balance.mean()), float(balance.max())
        if trace.counts_only:
            return Score(tokens=float(trace.expert_counts[0].sum()), balance_mean=mean, balance_max=largest)

        rng = np.random.default_rng(SEED)
        by_device, by_host = _Places(len(self.speed)), _Places(int(self.host_of.max()) + 1)
        for layer, shares in enumerate(self.shares):
            # A row for each choice: what follows goes through whole rows.
            ids = np.ascontiguousarray(trace.expert_ids[:, layer].T, np.intp)
            chosen = (shares > 0).argmax(axis=1)[ids] if self.single else _drawn(ids, shares, rng)
            by_device.add(chosen)
            by_host.add(self.host_of[chosen])
        crossed = self.single and trace.layers > 1
        return Score(
            tokens=trace.tokens,
            balance_mean=mean,
            balance_max=largest,
            boundary_cross_device=by_device.crossed if crossed else None,
            boundary_cross_host=by_host.crossed if crossed else None,
            fanout_device=float(np.mean(by_device.distinct)),
            fanout_host=float(np.mean(by_host.distinct)),
        )


def reached_balance(slots: Slots, load: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """[L] mean balance over windows."""
    return balance_of([slots.finish(window, speed) * speed for window in load], speed).mean(axis=0)


def _drawn(ids: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[K, T] device that serves each choice; ids: [K, T], shares: [E, G]."""
    # Column by column of the copies that an expert has at most, not of all devices.
    draw, most = rng.random(ids.shape[::-1]).T, int((shares > 0).sum(axis=1).max())
    holders = np.argsort(shares == 0, axis=1, kind="stable")[:, :most]
    upto = np.take_along_axis(np.where(shares > 0, shares.cumsum(axis=1), np.inf), holders, axis=1)
    copy = np.zeros(ids.shape, np.int64)
    for column in range(most - 1):
        copy += upto[:, column][ids] <= draw
    return holders[ids, copy]


class _Places:
    """What tokens need of ``count`` places, layer after layer.

    distinct: mean number of places of a token, of each layer.
    """

    def __init__(self, count: int) -> None:
        # Words that hold 64 places each.
        number = np.arange(count)
        bit = np.left_shift(np.uint64(1), (number % 64).astype(np.uint64))
        self.words = [np.where(number // 64 == word, bit, np.uint64(0)) for word in range(-(-count // 64))]
        self.distinct: list[float] = []
        self.moved = self.seen = 0
        self.before: np.ndarray | None = None

    def add(self, places: np.ndarray) -> None:
        """The next layer's places [K, T]."""
        found = np.zeros(places.shape[1], np.int64)
        for word in self.words:
            found += np.bitwise_count(np.bitwise_or.reduce(word[places], axis=0))
        self.distinct.append(float(found.mean()))
        if self.before is not None:
            self.moved += int((places[0] != self.before).sum())
            self.seen += places.shape[1]
        self.before = places[0]

    @property
    def crossed(self) -> float:
        """Share of (token, boundary) whose first choices are in different places."""
        return self.moved / self.seen

"""Spectral and semidefinite bounds on the tokens that change places (devices or hosts) between layers.

There are P places of ``slots`` slots each, all of them full: experts without tokens fill what is left over.

    x[p] in {0, 1}^(L E)    the experts, of all layers, that place p holds
    Y = sum_p x[p] x[p]'    1 where two experts share a place;  Z = Y - 1 / P (every entry)
    maximise sum_l <transitions[l], Y[l, l+1]>

Every placement satisfies, and the relaxations keep only,

    (1) Z is positive semidefinite: sum_p (x[p]'v)^2 >= (sum_p x[p]'v)^2 / P     ``_nearest_form``
    (2) Z 1[l] = 0: a place has as many slots in every layer                     ``_centred``
    (3) no eigenvalue of Z on two layers exceeds 2 slots                         ``_nearest_form``
    (4) an expert shares its own place: the diagonal of Y is 1                   ``_nearest_entries``
    (5) 0 <= Y <= 1                                                              ``_nearest_entries``
    (6) sharing is transitive, and a device takes only so much load              ``bounds.rows``, ``bounds.cap_rows``

"spectral" has (1)-(4): Donath and Hoffman's bound (1973) with the best diagonal. "semidefinite" adds (5), "triangle"
adds (6). One run goes through them in this order; each starts from what the one before found.

Costs and rows touch only neighbouring layers, so (1) is asked of windows of two layers that agree on the layer they
share: by the completion theorem for chordal patterns (Grone et al. 1984) that is as strong as one matrix over all
layers. The method alternates between windows, (1)-(3), and entries, (4)-(5) (ADMM); its multipliers price their
disagreement. Whatever the multipliers, the least of the Lagrangian over either set by itself is exact and cheap, and
the sum of the two is a bound (weak duality): every step counts, none has to converge.
"""

# B boundaries (L - 1), E experts with fillers, L layers, P places

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from .eigen import EigenClip
from .rows import Rows, Triangles

FIRST_STEP = 3  # times an eigenvalue problem of every boundary: the first bound and the first step
LARGE = 256  # rows: a single eigenvalue problem takes a while
LATE = 1.2  # times what a step and a bound took
CHECK = 10  # steps between two evaluations of the bound
PATIENCE = 1e-4  # a relaxation ends once STALLS checks in a row gain less than this part of the bound
STALLS = 12
PHASES = (("spectral", 0.05), ("semidefinite", 0.15), ("triangle", 1.0))  # name, part of the work at which it ends
RELAXATION = 1.6  # the usual over-relaxation of ADMM
PENALTY = 0.15  # the first, for costs scaled to 1 per expert
IMBALANCE = 3.0  # ratio of the two residuals beyond which the penalty changes
PENALTY_STEP = 1.5


def least_leaving(
    transitions: np.ndarray,
    places: int,
    slots: int,
    rows: Sequence[Rows] = (),
    *,
    steps: int,
    deadline: float = np.inf,
    on_bound: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Lower bounds, by relaxation, on the tokens that change places, summed over the boundaries.

    transitions: [B, E, E] tokens; places: how many; slots: of each place, in every layer; places * slots >= E.
    rows: more inequalities than the triangles', for windows of places * slots experts a layer.
    steps: work budget of all relaxations together; deadline: ``time.perf_counter()`` at which to stop at the latest,
    into which all of them are squeezed. on_bound: is told of the best bound so far, whenever it was looked at.

    Returns bounds by name; none where not even the first step would end before the deadline.
    """
    boundaries, experts, _ = transitions.shape
    total = float(transitions.sum())
    if places == 1 or slots >= experts or total == 0.0:
        return {name: 0.0 for name, _ in PHASES}
    size = places * slots
    if deadline < np.inf and not _affordable(boundaries, 2 * size, deadline):
        return {}
    scale = size * boundaries / total
    counts = np.zeros((boundaries, size, size))
    counts[:, :experts, :experts] = scale * transitions
    run = _Relaxation(counts, places, slots, [Triangles(boundaries, size, places), *rows])

    best, done, late = -np.inf, 0, False
    reached: dict[str, float] = {}
    began = time.perf_counter()
    judged = stepped = 0.0  # seconds that the bound, and a step, took the last time
    for name, end in PHASES:
        run.entries, run.tightened = name != "spectral", name == "triangle"
        stalls = 0
        while not late:
            now = time.perf_counter()
            # The bound of a step counts only if it is judged as well.
            late = now + LATE * (stepped + judged) >= deadline
            last = late or done >= round(end * steps) or now - began >= end * (deadline - began)
            if last or done % CHECK == 0:
                bound = total * (1 - 1 / places) + run.least() / scale
                judged = time.perf_counter() - now
                if now + LATE * judged >= deadline and best > -np.inf:
                    late = True
                stalls = 0 if bound > best + PATIENCE * abs(best) else stalls + 1
                best = max(best, bound)
                if on_bound:
                    on_bound(max(best, 0.0))
                if last or stalls > STALLS:
                    break
                run.balance()
                run.separate()
            now = time.perf_counter()
            run.step()
            stepped = time.perf_counter() - now
            done += 1
        reached[name] = max(best, 0.0)
    return reached


def _affordable(boundaries: int, size: int, deadline: float) -> bool:
    """Whether a first bound and a first step end in time; a quarter of the size tells first whether asking does."""
    for part, times in ((4, 64), (1, 1)) if size >= LARGE else ((1, 1),):
        if time.perf_counter() + FIRST_STEP * boundaries * times * _eigenvalue_seconds(size // part) > deadline:
            return False
    return True


def _eigenvalue_seconds(size: int) -> float:
    """What one eigenvalue problem of this size takes on this machine."""
    matrix = np.random.default_rng(0).standard_normal((size, size))
    began = time.perf_counter()
    np.linalg.eigh(matrix + matrix.T)
    return time.perf_counter() - began


@dataclass
class _Relaxation:
    """One run; ``counts`` [B, E, E] is what a pair of neighbouring layers saves where it shares a place.

    within [L, E, E], between [B, E, E]: the entries of Z inside a layer and from a layer to the next. Windows are
    [B, 2E, 2E]: two layers each, symmetric, so that a pair of experts counts twice.
    price: the multipliers of the windows over ``penalty``; tax: what the rows charge.
    """

    counts: np.ndarray
    places: int
    slots: int
    rows: Sequence[Rows]
    entries: bool = False
    tightened: bool = False
    penalty: float = PENALTY
    within: np.ndarray = field(init=False)
    between: np.ndarray = field(init=False)
    price: np.ndarray = field(init=False)
    apart: float = 1.0
    moved: float = 1.0

    def __post_init__(self) -> None:
        boundaries, size, _ = self.counts.shape
        self._clip = EigenClip(2.0 * self.slots)
        self.within = np.tile(np.eye(size) * (1 - 1 / self.places), (boundaries + 1, 1, 1))
        self.between = np.zeros_like(self.counts)
        self._charge(np.zeros((boundaries, 2 * size, 2 * size)), 0.0)
        # All of the cost on the windows: the spectral bound with a flat diagonal.
        self.price = self._windows(np.zeros_like(self.within), self.cost_between) / self.penalty

    def step(self) -> None:
        entries = self._windows(self.within, self.between)
        form = self._nearest_form(entries - self.price)
        relaxed = RELAXATION * form + (1 - RELAXATION) * entries
        self._nearest_entries(relaxed + self.price)
        after = self._windows(self.within, self.between)
        self.price += relaxed - after
        self.apart = float(np.linalg.norm(form - after))
        self.moved = self.penalty * float(np.linalg.norm(after - entries))
        if self.tightened:
            taxes = [rows.ascend(after, self.penalty / len(self.rows)) for rows in self.rows]
            self._charge(np.add.reduce([tax for tax, _ in taxes]), sum(constant for _, constant in taxes))

    def separate(self) -> None:
        if self.tightened:
            for rows in self.rows:
                rows.separate(self._windows(self.within, self.between))

    def balance(self) -> None:
        """Keep both residuals of the same order (Boyd et al. 2011, 3.4.1)."""
        factor = 1.0
        if self.apart > IMBALANCE * self.moved:
            factor = PENALTY_STEP
        elif self.moved > IMBALANCE * self.apart:
            factor = 1 / PENALTY_STEP
        self.penalty *= factor
        self.price /= factor

    def least(self) -> float:
        """The least of the Lagrangian: a bound on minus what any Z saves."""
        multiplier, size = self.penalty * self.price, self.counts.shape[1]
        # The trace is 2 E (1 - 1 / P) and no eigenvalue exceeds 2 slots: P - 1 of them, at most, count in full.
        # (2) leaves out each layer's all-ones vector: as the largest eigenvalues of all they do not count.
        inside = _centred(multiplier)
        inside += np.kron(np.eye(2), np.ones((size, size))) * np.linalg.norm(inside, axis=(1, 2), keepdims=True) / size
        values = np.linalg.eigvalsh(inside)[:, : self.places - 1]
        within, between = self._blocks(-multiplier)
        within, between = within + self.cost_within, between + self.cost_between
        low, high = -1 / self.places, 1 - 1 / self.places
        diagonal = np.einsum("lii->li", within)
        own = high * diagonal.sum()
        diagonal[...] = 0.0
        shared = np.minimum(low * within, high * within).sum() + 2 * np.minimum(low * between, high * between).sum()
        return float(2 * self.slots * values.sum() + own + shared) + self.constant

    def _charge(self, tax: np.ndarray, constant: float) -> None:
        self.cost_within, self.cost_between = self._blocks(tax)
        self.cost_between -= self.counts / 2
        self.constant = constant

    def _nearest_form(self, windows: np.ndarray) -> np.ndarray:
        """(1), (2), (3)"""
        return self._clip(_centred(windows))

    def _nearest_entries(self, windows: np.ndarray) -> None:
        """(4), (5)"""
        within, between = self._blocks(windows)
        within -= self.cost_within / self.penalty
        within[1:-1] /= 2  # the layers that two windows share
        between -= self.cost_between / self.penalty
        low, high = -1 / self.places, 1 - 1 / self.places
        if self.entries:
            np.clip(within, low, high, out=within)
            np.clip(between, low, high, out=between)
        np.einsum("lii->li", within)[...] = high
        self.within, self.between = within, between

    def _windows(self, within: np.ndarray, between: np.ndarray) -> np.ndarray:
        upper = np.concatenate([within[:-1], between], axis=2)
        lower = np.concatenate([between.transpose(0, 2, 1), within[1:]], axis=2)
        return np.concatenate([upper, lower], axis=1)

    def _blocks(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sum over the windows, as ``within`` and ``between``."""
        size = self.counts.shape[1]
        within = np.zeros((len(windows) + 1, size, size))
        within[:-1] += windows[:, :size, :size]
        within[1:] += windows[:, size:, size:]
        return within, windows[:, :size, size:].copy()


def _centred(windows: np.ndarray) -> np.ndarray:
    """[B, 2E, 2E] the nearest windows with (2): every row and column of a block sums to 0."""
    blocks = windows.reshape(len(windows), 2, windows.shape[1] // 2, 2, windows.shape[1] // 2)
    blocks = blocks - blocks.mean(axis=2, keepdims=True)
    return (blocks - blocks.mean(axis=4, keepdims=True)).reshape(windows.shape)

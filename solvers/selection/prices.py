"""Prices on memory: a lower bound on the selection, a choice that fits, and options that no better choice has.

Choices are divided into cases by what their regions take: in a case, the largest need of any chosen option of region f,
as a part of the devices' capacity, lies in one interval. So the options are known that a case allows, and what its
regions take at least: what is left is remaining[s, d]. With a price lambda[s, d] >= 0 on every byte, memory is no limit
but a cost, and the layers fall apart:

    L(s, lambda) = sum_c n[c] min_{o allowed in s} (cost + lambda[s] . memory)[c, o] - lambda[s] . remaining[s]

is a lower bound on every choice of case s for every lambda (Lagrange), and the least over the cases on all. The prices
follow the subgradient, by how much a minimiser exceeds what is left (Held, Wolfe and Crowder 1974). Minimisers that
exceed it are made to fit (``repair``); a case whose bound exceeds the best choice is closed, and so are options.
"""

# C classes of layers, O options, F regions, D classes of devices, S cases

import itertools
from dataclasses import dataclass

import numpy as np

from ..result import ROUNDING
from .problem import Problem
from .repair import repair

STEPS, PATIENCE = 100, 5  # of the subgradient; steps without a better bound after which they become shorter
CASES = 64  # about, at most
REPAIRS = 30  # choices that are made to fit


@dataclass
class Priced:
    """bound: on every choice; chosen: [C, O] the fastest found that fits, and its seconds; open: [C, O] options that a
    faster choice may have."""

    bound: float
    chosen: np.ndarray | None
    seconds: float
    open: np.ndarray

    def offer(self, problem: Problem, chosen: np.ndarray | None) -> None:
        """Take a choice where it fits and is faster."""
        if chosen is not None and problem.fits(chosen) and problem.seconds(chosen) < self.seconds:
            self.chosen, self.seconds = chosen, problem.seconds(chosen)


def price(problem: Problem, gap: float) -> Priced:
    """Bound, choice and open options; ends where they are within ``gap`` of each other, relative."""
    best = Priced(float(problem.count @ problem.cost.min(axis=1)), None, np.inf, problem.available)
    allowed, remaining = _cases(problem)
    if not len(remaining):
        return best
    unit = np.maximum(problem.capacity, 1).astype(float)  # one price per device is one scale
    own, remaining = problem.memory / unit, remaining / unit
    prices, proven = np.zeros(remaining.shape), np.full(len(remaining), -np.inf)
    open_ = allowed.copy()
    scale, since = np.full(len(remaining), 2.0), np.zeros(len(remaining), int)
    slowest, repairs = float(problem.count @ np.where(problem.available, problem.cost, 0.0).max(axis=1)), 0
    for _ in range(STEPS):
        each = np.where(allowed, problem.cost + np.einsum("cod,sd->sco", own, prices), np.inf)
        least, pick = each.min(2), each.argmin(2)  # [S, C]
        bound = least @ problem.count - (prices * remaining).sum(1)
        better = bound > proven
        proven = np.where(better, bound, proven)
        since = np.where(better, 0, since + 1)
        for s in sorted(np.flatnonzero(better), key=lambda s: proven[s])[:2]:
            chosen = np.zeros(problem.cost.shape, np.int64)
            chosen[np.arange(len(chosen)), pick[s]] = problem.count
            best.offer(problem, chosen)
            if repairs < REPAIRS and proven[s] < best.seconds and not problem.fits(chosen):
                best.offer(problem, repair(problem, chosen, allowed[s]))
                repairs += 1
        limit = best.seconds * (1 + ROUNDING)
        open_ = open_ & (bound[:, None, None] - least[:, :, None] + each <= limit)
        best.bound = max(best.bound, min(float(proven.min()), best.seconds))
        if best.seconds - best.bound <= gap * best.seconds:
            break
        shorter = since >= PATIENCE
        scale, since = np.where(shorter, scale / 2, scale), np.where(shorter, 0, since)
        over = own[np.arange(len(pick.T)), pick].transpose(0, 2, 1) @ problem.count - remaining  # [S, D]
        aim = np.maximum(min(best.seconds, slowest) - bound, 0.0)
        norm = (over * over).sum(1)
        prices = np.maximum(prices + (scale * aim / np.where(norm > 0, norm, 1.0))[:, None] * over, 0.0)
    best.open = np.asarray((open_ & (proven <= best.seconds * (1 + ROUNDING))[:, None, None]).any(0))
    if best.chosen is not None:
        best.open |= best.chosen > 0  # whatever the rounding
    return best


def _cases(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """[S, C, O] options that each case allows, and [S, D] bytes that its regions leave; only cases that may fit."""
    unit = np.maximum(problem.capacity, 1)
    need = (problem.shared / unit).max(3)  # [C, O, F]
    regions, available = need.shape[2], problem.available
    intervals: list[list[tuple[np.ndarray, np.ndarray]]] = []  # per region: options that are allowed, bytes [D]
    numbers = [np.unique(need[..., f][available]) for f in range(regions)]
    left = CASES
    for f in sorted(range(regions), key=lambda f: len(numbers[f])):
        # The numbers of an interval lie close together: it ends where the next differs most.
        cuts = np.sort(np.argsort(-np.diff(numbers[f]), kind="stable")[: max(1, left - 1)]) + 1
        found = []
        for low, high in zip(numbers[f][[0, *cuts]], numbers[f][[*(cuts - 1), -1]], strict=True):
            inside = available & (need[..., f] <= high)
            largest = inside & (need[..., f] >= low)  # one of these is chosen
            least = problem.shared[:, :, f][largest].min(0)
            found.append((inside, least))
        intervals.append(found)
        left = max(left // len(found), 1)
    allowed, remaining = [], []
    big = np.int64(2**62)
    for parts in itertools.product(*intervals):
        inside = np.logical_and.reduce([available, *(options for options, _ in parts)])
        rest = problem.capacity - sum((least for _, least in parts), np.zeros(len(unit), np.int64))
        smallest = np.where(inside[..., None], problem.memory, big).min(1)
        if inside.any(1).all() and (problem.count @ smallest <= rest).all():
            allowed.append(inside)
            remaining.append(_whole(problem, inside, smallest, rest))
    return np.array(allowed).reshape(-1, *problem.cost.shape), np.array(remaining).reshape(-1, len(unit))


def _whole(problem: Problem, allowed: np.ndarray, smallest: np.ndarray, remaining: np.ndarray) -> np.ndarray:
    """[D] the part of ``remaining`` that choices can fill: beside the smallest of every class, whole multiples of the
    common divisor of what options need more."""
    more = np.where(allowed[..., None], problem.memory - smallest[:, None], 0)
    divisor = np.maximum(np.gcd.reduce(more.reshape(-1, len(remaining))), 1)
    least = problem.count @ smallest
    return least + (remaining - least) // divisor * divisor

"""The default balance cap: as loose as keeps about EPLB's balance on tokens to come, by trials on halves of the trace.

A search uses up what a cap allows, so that its balance rises more than a greedy placement's on tokens that it has not
seen; by how much depends on the trace. Caps between the coolest placement and EPLB's balance are therefore tried on
each half of the trace and scored on the other, EPLB beside them (cross-fitting). A trial which ran out of time has not
used up what its cap allows: the cap is then as much closer to the coolest as steps are missing.
"""

# H halves, F fractions, S samples, L layers, E experts, G devices

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from ...solvers.balance import mean_balance, mean_balance_bound
from ...solvers.placement.affinity import Affinity
from ...solvers.result import NotFound
from ...spec.trace import Trace
from ..budget import Budget
from . import baselines
from .sample import load_samples, windows
from .single import Single, device_of

FRACTIONS = (0.1, 0.4, 0.7, 1.0)  # of the way from the coolest placement's balance to EPLB's
SPREAD = 0.75  # where nothing was tried: trials on recorded traces chose 0.67 to 0.9
WHOLE_TIME = 0.15  # of the time goes to the coolest placement of the whole trace at most
ALLOWED = 0.01  # of balance above EPLB's on tokens to come, for the crossings that it saves
LEAST_SLACK = 0.003  # of balance above the coolest placement, or nothing is left to choose
TRIAL_STEPS, COOLEST_STEPS = 150, 60  # per layer and expert
SHORTEST = 0.05  # seconds of a search for the coolest placement, below which the greedy one stands for it
SETUP, LARGE = 6.0, 14_848  # seconds of a processor that trials of 58 layers x 256 experts take
LEAST_PART = 0.8  # of the time that they may take
ENOUGH_WORK = 0.95  # of the trials' steps: less is worth a note


class Range(NamedTuple):
    """Mean balance over load samples of the coolest placement that a short search finds, and of EPLB's.

    in_time: the search did all its steps as planned.
    """

    coolest: float
    usual: float
    in_time: bool

    def at(self, fraction: float) -> float:
        """The balance so far on the way from the coolest to EPLB's."""
        return self.coolest + max(fraction * (self.usual - self.coolest), LEAST_SLACK)


class Trials(NamedTuple):
    """Of one half: excess [F] of the balance on the other, part [F] of the steps done; nan where nothing was found."""

    excess: np.ndarray
    work: np.ndarray
    in_time: bool


class Cap(NamedTuple):
    """The cap, what the user should know of its making, and whether it is the same in every run."""

    value: float
    notes: tuple[str, ...]
    in_time: bool


def first_cap(single: Single, trace: Trace) -> float:
    """A cap that takes no search: at ``SPREAD`` of the way from the least balance that is proven to EPLB's."""
    load, fleet = load_samples(trace), single.fleet
    usual = mean_balance(_baseline(single, trace), load, fleet.speed)
    least = mean_balance_bound(load, fleet.speed, fleet.capacity)
    return least + SPREAD * max(usual - least, LEAST_SLACK)


def default_cap(single: Single, trace: Trace, budget: Budget) -> Cap:
    """A cap on the mean balance over ``load_samples`` of the trace.

    The excess of a trial is its balance on the other half less EPLB's. A line through the larger excess of both halves
    at each of ``FRACTIONS`` says where it is ``ALLOWED``. Without time for trials it is ``first_cap``. Raises
    ``SolverError`` as ``anneal``.
    """
    least = SETUP * budget.slowdown * trace.expert_counts.size / LARGE
    if not budget.part(LEAST_PART).affords(least, "trials of the balance cap"):
        return Cap(first_cap(single, trace), (), False)
    free = replace(single, previous=None, max_moves=None)
    whole = balance_range(free, trace, budget.part(WHOLE_TIME))
    halves = trace.part(0, 0.5), trace.part(0.5, 1)
    with ThreadPoolExecutor(len(halves)) as pool:
        trials = list(pool.map(lambda a, b: _trials(free, a, b, budget), halves, halves[::-1]))
    excess, work = np.stack([t.excess for t in trials]), np.stack([t.work for t in trials])
    in_time = whole.in_time and all(t.in_time for t in trials)
    missing = int(np.isnan(work).sum())
    done = 1.0 if missing == work.size else float(np.nanmean(work))
    return Cap(whole.at(_fraction(excess) * done), _notes(missing, work.size, done, in_time), in_time)


def _notes(missing: int, trials: int, done: float, in_time: bool) -> tuple[str, ...]:
    """What the user should know of the trials; done: part of the steps of those that found something."""
    if missing and in_time:
        return (f"{missing} of {trials} trials of the balance cap found nothing, so it is tighter than need be",)
    if missing:
        note = f"{missing} of {trials} trials of the balance cap found nothing in their time"
    elif done < ENOUGH_WORK:
        note = f"trials of the balance cap had time for {done:.0%} of their steps, so it is tighter than need be"
    else:
        return ()
    return (f"{note}: raise --time-limit",)


def _trials(single: Single, fitted: Trace, rest: Trace, budget: Budget) -> Trials:
    """A search at each of ``FRACTIONS`` on ``fitted``, scored on ``rest``."""
    load, speed = load_samples(fitted), single.fleet.speed
    turns = len(FRACTIONS) + 1
    affinity = single.counted(fitted)  # what it costs to keep a cap hardly depends on how crossings are smoothed
    whole = balance_range(single, fitted, budget.part(1 / turns))
    unseen = windows(rest, 1)
    baseline = mean_balance(_baseline(single, fitted), unseen, speed)
    excess, work, in_time = np.full(len(FRACTIONS), np.nan), np.full(len(FRACTIONS), np.nan), whole.in_time
    longest = 0.0
    for i, fraction in enumerate(FRACTIONS):
        # Tables take a while to set up, whatever the search is allowed: a trial begins only if they are worth it.
        if longest > budget.left:
            in_time = False
            break
        mine = budget.part(1 / (len(FRACTIONS) - i))
        cap, steps = whole.at(fraction), TRIAL_STEPS * load[0].size
        try:
            found = single.solve(affinity, load, cap=cap, steps=steps, chains=1, budget=mine)
        except NotFound as error:
            in_time &= error.in_time
            continue
        finally:
            longest = max(longest, time.perf_counter() - mine.deadline)
        excess[i] = mean_balance(found.assignment, unseen, speed) - baseline
        work[i] = found.work
        in_time &= found.status != "time_limit"
    return Trials(excess, work, in_time)


def balance_range(single: Single, trace: Trace, budget: Budget) -> Range:
    """What caps on this trace may lie between. Raises ``SolverError`` as ``anneal``."""
    load, speed = load_samples(trace), single.fleet.speed
    usual = _baseline(single, trace)
    if budget.left < SHORTEST:
        coolest = min(mean_balance(placed, load, speed) for placed in (usual, single.start(trace)))
        return Range(coolest, mean_balance(usual, load, speed), False)
    nothing = Affinity.of(np.zeros((trace.layers - 1, trace.num_experts, trace.num_experts)))
    steps = COOLEST_STEPS * load[0].size
    found = single.solve(nothing, load, price=1.0, steps=steps, chains=1, budget=budget)
    coolest = mean_balance(found.assignment, load, speed)
    return Range(coolest, mean_balance(usual, load, speed), found.status != "time_limit")


def _baseline(single: Single, trace: Trace) -> np.ndarray:
    """[L, E] EPLB's placement where it can be asked, else the greedy one."""
    fleet, load = single.fleet, trace.expert_counts
    slots = baselines.eplb_slots(load, trace.num_experts, single.groups, fleet) if fleet.alike else None
    return baselines.greedy(load, fleet) if slots is None else device_of(slots)


def _fraction(excess: np.ndarray) -> float:
    """Where a line through the largest excess reaches ALLOWED, within FRACTIONS; excess: [H, F]."""
    tried = ~np.isnan(excess).all(axis=0)
    if tried.sum() < 2:
        return FRACTIONS[0]  # nothing is known: the safest
    slope, start = np.polyfit(np.array(FRACTIONS)[tried], np.nanmax(excess[:, tried], axis=0) - ALLOWED, 1)
    if slope <= 0:
        return FRACTIONS[-1] if start + slope <= 0 else FRACTIONS[0]
    return float(np.clip(-start / slope, FRACTIONS[0], FRACTIONS[-1]))

"""Replication by patterns: is there a placement of some experts on some devices in which all end by a given time?

A pattern is what one device may hold: with even shares, copies (e, c) of experts e that have c copies each, no two of
an expert, whose load[e] / c together end in time; with optimal shares, as many experts as the device has slots.
Devices that are alike are not told apart, so the program has no symmetry to search through, and its relaxation is
strong. The number of patterns grows fast with the slots of a device: for small cases.

    use[p] in 0 .. devices of its kind    devices that hold pattern p
    copies[e, c] in {0, 1}                even: expert e has c copies
    tokens[e, p] >= 0                     optimal: what the devices with pattern p compute of expert e

    (1) kinds:   sum of use over a kind's patterns <= its devices (= where every slot must be full)   ``feasible``
    (2) copies:  even: sum of use over the patterns with (e, c) = c * copies[e, c],
                 sum_c copies[e, c] = 1                                                               ``_even``
    (3) tokens:  optimal: sum_p tokens[e, p] = load[e]; tokens[e, p] <= load[e] * use[p];
                 sum_e tokens[e, p] <= end * speed * use[p];
                 sum of use over the patterns with e >= load[e] / (end * fastest speed), rounded up    ``_optimal``
"""

# E experts, G devices, R slots

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pulp

from ..bounds.replication import Shares
from ..mip import solve
from ..result import NotFound
from ..slots import EMPTY

Pattern = tuple[tuple[int, int], ...]  # (expert, its copies; 0 with optimal shares: not said)
MAX_PATTERNS = 5_000


class TooManyPatterns(NotFound):
    """This form is not the one for the case."""


@dataclass(frozen=True)
class _Kind:
    """Devices that are alike."""

    speed: float
    slots: int
    devices: tuple[int, ...]


Use = list[tuple[_Kind, Pattern, pulp.LpVariable]]


def feasible(
    load: np.ndarray,
    speed: np.ndarray,
    capacity: np.ndarray,
    end: float,
    *,
    shares: Shares,
    full: bool,
    solver: str,
    seed: int,
    time_limit: float,
) -> np.ndarray | None:
    """Experts in slots [R] such that, with the right shares, every device ends by ``end``; None: proven impossible.

    load: [E]; speed, capacity (at most E): [G]. Raises ``NotFound`` when the time ends first, and
    ``TooManyPatterns``.
    """
    most = min(int((capacity > 0).sum()), int(capacity.sum()) - len(load) + 1)
    if most < 1:
        return None
    alike: dict[tuple[float, int], list[int]] = {}
    for g in np.flatnonzero(capacity):
        alike.setdefault((float(speed[g]), int(capacity[g])), []).append(int(g))
    program = pulp.LpProblem("patterns", pulp.LpMinimize)
    program += 0
    use: Use = []
    for i, ((fast, slots), devices) in enumerate(alike.items()):
        kind = _Kind(fast, slots, tuple(devices))
        here = []
        for j, pattern in enumerate(_patterns(load, kind, most, end, shares, full)):
            if len(use) + j >= MAX_PATTERNS:
                raise TooManyPatterns(f"more than {MAX_PATTERNS} patterns: too many experts or slots for this form")
            here.append((kind, pattern, program.add_variable(f"use_{i}_{j}", 0, len(devices), pulp.LpInteger)))
        total = pulp.lpSum(variable for _, _, variable in here)
        program += total == len(devices) if full else total <= len(devices)
        use += here
    held = {e for _, pattern, _ in use for e, _ in pattern}
    if len(held) < len(load):  # an expert fits nowhere
        return None
    if shares == "even":
        _even(program, use)
    else:
        _optimal(program, load, use, end)

    if solve(program, solver=solver, time_limit=time_limit, seed=seed).status == "infeasible":
        return None
    first = np.cumsum(capacity) - capacity
    at = np.full(int(capacity.sum()), EMPTY)
    taken = dict.fromkeys((kind for kind, _, _ in use), 0)
    for kind, pattern, variable in use:
        for _ in range(round(variable.varValue)):
            device = kind.devices[taken[kind]]
            taken[kind] += 1
            at[first[device] : first[device] + len(pattern)] = [e for e, _ in pattern]
    return at


def _patterns(load: np.ndarray, kind: _Kind, most: int, end: float, shares: Shares, full: bool) -> Iterator[Pattern]:
    """What one device of this kind may hold; most: copies of one expert."""
    experts, most_load = len(load), end * kind.speed
    if shares == "optimal":
        yield from (tuple((e, 0) for e in held) for held in combinations(range(experts), kind.slots))
        return

    def extend(before: Pattern, carried: float, lowest: int) -> Iterator[Pattern]:
        if before and (len(before) == kind.slots or not full):
            yield before
        if len(before) == kind.slots:
            return
        for e in range(lowest, experts):
            for c in range(most, 0, -1):
                carries = carried + load[e] / c
                if carries > most_load:
                    break
                yield from extend((*before, (e, c)), carries, e + 1)

    yield from extend((), 0.0, 0)


def _even(program: pulp.LpProblem, use: Use) -> None:
    placed: dict[tuple[int, int], list[pulp.LpVariable]] = {}
    for _, pattern, variable in use:
        for copy in pattern:
            placed.setdefault(copy, []).append(variable)
    chosen: dict[int, list[pulp.LpVariable]] = {}
    for (e, c), variables in placed.items():
        copies = program.add_variable(f"copies_{e}_{c}", 0, 1, pulp.LpInteger)
        program += pulp.lpSum(variables) == c * copies
        chosen.setdefault(e, []).append(copies)
    for copies in chosen.values():
        program += pulp.lpSum(copies) == 1


def _optimal(program: pulp.LpProblem, load: np.ndarray, use: Use, end: float) -> None:
    tokens: dict[int, list[pulp.LpVariable]] = {}
    placed: dict[int, list[pulp.LpVariable]] = {}
    for i, (kind, pattern, variable) in enumerate(use):
        here = []
        for e, _ in pattern:
            computed = program.add_variable(f"tokens_{e}_{i}", 0, float(load[e]))
            program += computed <= float(min(load[e], end * kind.speed)) * variable
            here.append(computed)
            tokens.setdefault(e, []).append(computed)
            placed.setdefault(e, []).append(variable)
        program += pulp.lpSum(here) <= end * kind.speed * variable
    fastest = max(kind.speed for kind, _, _ in use)
    for e, computed in tokens.items():
        program += pulp.lpSum(computed) == float(load[e])
        program += pulp.lpSum(placed[e]) >= max(1, math.ceil(load[e] / (end * fastest) - 1e-9))

"""Placements inside ``solve``: the candidates of ``ep`` for the tokens of one step, on measured devices.

    d[c, e] in devices     the device of expert e in class c of layers (single copies)
    minimise  inside * devices[c] + (between - inside) * hosts[c] + ideal[c] * balance[c]      seconds, class by class

devices, hosts are the means over tokens of how many hold the token's experts; ``inside`` and ``between`` what one of
them more takes over the measured links, for all tokens of the step; ideal[c] what the experts take where all devices
are equally busy, and balance[c] the hottest device over that. It is an estimate: contention and curves are left to the
prediction, which decides over every candidate.

Classes do not touch each other. Where their arrangements are few all are looked at, which proves the optimum (very few
are all offered); else they are annealed. With slots to spare, copies of hot experts and the shares that they take are
searched for balance (``solvers.replication``), and offered a second time without shares: tokens then go to the nearest.
"""

# C classes of layers, T tokens of a class, K top-k, E experts, G devices, N arrangements

from dataclasses import replace

import numpy as np

from ...solvers.balance import linear, over_ideal
from ...solvers.exact.arrangements import arrangements, hottest
from ...solvers.placement.affinity import Affinity, pairs
from ...solvers.placement.fan_out import expert_sets, fan_outs
from ...solvers.slots import Slots
from ..budget import Budget
from . import baselines
from .fleet import Fleet
from .priced import PRICES, priced
from .question import Placed, Question, said
from .ready import solvers_ready

MOST_ARRANGEMENTS, MOST_CELLS = 4_096, 3e7  # of classes x arrangements x sets of experts x places
SEARCH_TIME, LEAST_TIME = 0.2, 0.02  # of the time left, and seconds, that one search may take
ONE, ALL = "arrangement", "arrangement 0"  # the second is there where all are
EVERY = 64  # arrangements of all classes together that are all offered
SECONDS = "estimated seconds of a layer's exchange and experts"


def usual(question: Question, *, measured: bool) -> dict[str, Placed]:
    """What needs no search: experts by number, and greedy balance; ``measured``: by the devices' speeds as well."""
    fleet, load, devices = question.fleet, question.load, len(question.fleet.speed)
    rows = np.tile(linear(question.experts, devices), (len(load), 1))
    found = {"linear": _single(question, rows, "experts by number")}
    if devices > 1 and fleet.capacity.sum() >= question.experts:
        equal = Fleet(np.ones(devices), fleet.capacity, fleet.hosts, fleet.names)
        found["greedy"] = _single(question, baselines.greedy(question.counts, equal), "greedy balance")
        if measured:
            found["weighted"] = _single(question, baselines.greedy(load, fleet), "greedy balance by measured speed")
    return found


def placements_for(question: Question, *, seed: int, budget: Budget, copies: bool) -> dict[str, Placed]:
    """By name what a search finds: single copies exactly or annealed, and ``copies`` in spare slots.

    budget: of all that is searched, of which this takes a part.
    """
    fleet = question.fleet
    if len(fleet.speed) == 1 or fleet.capacity.sum() < question.experts:
        return {}
    found = _exactly(question)
    # Loaded before the search's part of the time is measured: loading must not cut a search short.
    if found is None:
        able = solvers_ready(budget, question.load.size, everything=False)
        part = SEARCH_TIME / 2 if copies else SEARCH_TIME
        found = _annealed(question, seed, Budget.of(max(part * budget.left, LEAST_TIME))) if able else {}
    if (
        copies
        and found
        and question.copies_may_cool(found["local"].slots)
        and solvers_ready(budget, question.load.size)
    ):
        # Imported when it is needed: its compiled loops take a second to load.
        from .inside_copies import replicated

        mine = Budget.of(max(SEARCH_TIME / 2 * budget.left, LEAST_TIME))
        found |= replicated(question, found["local"].slots, seed, mine)
    return found


def _single(question: Question, device_of: np.ndarray, solver: str) -> Placed:
    """Slots are counted as they are taken, whether the devices have them or not."""
    fleet = question.fleet
    held = np.max([np.bincount(row, minlength=len(fleet.speed)) for row in device_of], axis=0)
    larger = replace(question, fleet=replace(fleet, capacity=np.maximum(fleet.capacity, held)))
    slots = Slots.from_device_of(device_of, held)
    return Placed(slots, solver, SECONDS, lambda: (question.seconds(device_of), larger.least()))


def _exactly(question: Question) -> dict[str, Placed] | None:
    """Every arrangement looked at; None where they are too many."""
    fleet, (inside, between) = question.fleet, question.weights
    at = arrangements(question.experts, fleet.capacity, fleet.hosts, most=MOST_ARRANGEMENTS)
    if at is None:
        return None
    levels = [(inside, np.arange(len(fleet.speed))), (between - inside, fleet.hosts)]
    levels = [(weight, place) for weight, place in levels if weight > 0]
    sets = [expert_sets(ids[:, None])[0] for ids in question.ids]
    if sum(len(tokens) for _, tokens in sets) * len(at) * len(fleet.speed) * len(levels) > MOST_CELLS:
        return None
    relative = over_ideal(question.load, fleet.speed)
    moved = np.stack([fan_outs(at, one, levels) / one[1].sum() for one in sets])
    heat = question.ideal[:, None] * np.stack([hottest(at, row[None], fleet.speed) for row in relative])
    found = {}
    for name, price in PRICES.items():
        rows = at[(moved + price * heat).argmin(axis=1)]
        found[name] = _arranged(question, rows, (moved + heat).min(axis=1))
    if len(at) * len(question.load) <= EVERY:
        for n, row in enumerate(at):
            rows = np.tile(row, (len(question.load), 1))
            found[f"{ONE} {n}"] = _arranged(question, rows, (moved + heat).min(axis=1))
    return found


def _arranged(question: Question, device_of: np.ndarray, least: np.ndarray) -> Placed:
    slots = Slots.from_device_of(device_of, question.fleet.capacity)
    return Placed(slots, "all arrangements", SECONDS, lambda: (question.seconds(device_of), least))


def _annealed(question: Question, seed: int, budget: Budget) -> dict[str, Placed]:
    top_k = question.ids[0].shape[1]
    together = np.stack(
        [pairs(ids[:, None], question.experts)[0] / (len(ids) * max(top_k - 1, 1)) for ids in question.ids]
    )
    affinity = Affinity.of(np.zeros((len(together) - 1, *together.shape[1:])), together)
    found = priced(question, affinity, float(question.ideal.mean()), seed=seed, budget=budget)
    return {
        name: _single(question, solution.assignment, said("annealing", solution.status))
        for name, solution in found.items()
    }

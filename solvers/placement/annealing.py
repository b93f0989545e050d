"""Annealing: experts on devices, one copy each, so that few tokens change devices at a given balance.

    d[l, e] in devices        the device that holds expert e of layer l
    minimise  sum_l sum_{a,b} transitions[l][a][b] * weight(d[l, a], d[l+1, b])         tokens that move between layers
            + sum_l sum_{a<b} together[l][a][b]    * weight(d[l, a], d[l, b])           tokens that need both experts
            + price * sum_l hottest[l]                                                  the price of balance

    weight is 0 on one device, ``device_weight`` between devices of a host, ``host_weight`` between hosts
    hottest[l] = mean_s max_g sum_{e: d[l, e] = g} load[s][l][e] / speed[g], over the ideal of sample s

    (1) slots:    #{e: d[l, e] = g} <= capacity[g]                          kept by every proposal, ``walk``
    (2) balance:  mean_l hottest[l] <= balance_cap                          ``Chain.steer``, then a rule of ``walk``
    (3) moves:    #{(l, e): d[l, e] != previous[l, e]} <= max_moves         a rule of ``walk``
    (4) hosts:    host(d[l, e]) = host(start[l, e]) where ``fixed_hosts``   a rule of ``walk``

Samples of the load are the risk: a placement that is balanced in *every* sample keeps its balance on tokens to come;
one that fits only their sum does not.

Simulated annealing from so warm that placements are random (Kirkpatrick et al. 1983), several chains. They freeze into
different orders, so the best layers of all of them are spliced (``placement.splice``), and a few chains go on from
there, only warm enough to mend the seams; again, and the best counts.

The cap's price rises while the balance lies above it and falls below it. Held to the cap at every temperature, a warm
walk would pay so much for balance that experts are stuck: short walks therefore find out what the cap costs in the end
(``Walks.scout``), the others keep that price while they are warm (Lagrangian relaxation) and follow the cap once they
are cold. Last, proposals that break (2) are refused. ``placement.kernel`` proposes for one expert or two,
``placement.relabel`` for whole devices. It is a heuristic; bounds are in ``bounds.crossings``.
"""

# L layers, E experts, G devices, R slots, S samples

import math
import time
from collections.abc import Callable
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..balance import check_cap, checked, idle, longest_first, mean_balance, over_ideal
from ..result import NotFound, Solution, Status
from .affinity import Affinity, pairs, usual_steps
from .chain import WARMEST, Problem, load_kernels
from .relabel import Groups
from .splice import Costs, splice
from .walks import GENERATIONS, THREADS, Walks

__all__ = ["Affinity", "anneal", "pairs", "usual_chains", "usual_steps"]

CHAINS, ENOUGH = 8, 40_000_000  # chains from random placements, fewer where so many proposals of all are enough
FOLLOWERS = 4  # chains after a splice
SPLICE = 0.1  # of the time that is left, at most, to a splice between walks
JUDGING, MOST_JUDGING = 1.2, 0.25  # of what comparing took at first; of the time for it at most
SEAMS = 0.1  # first temperature of these, over the mean traffic of an expert


def anneal(
    affinity: Affinity,
    load: ArrayLike,
    capacity: ArrayLike,
    speed: ArrayLike,
    hosts: ArrayLike,
    *,
    device_weight: float = 1.0,
    host_weight: float = 1.0,
    balance_cap: float = math.inf,
    price: float = 0.0,
    previous: np.ndarray | None = None,
    max_moves: int | None = None,
    start: np.ndarray | None = None,
    fixed_hosts: bool = False,
    steps: int | None = None,
    chains: int | None = None,
    generations: int = GENERATIONS,
    seed: int = 0,
    time_limit: float = math.inf,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    stop: Event | None = None,
) -> Solution[np.ndarray]:
    """Few crossings under (1) to (4).

    load: [L, E], or [S, L, E] samples; capacity: [G] slots per layer; speed: [G]; hosts: [G] number of each device's
    host. balance_cap: mean over layers, or ``price``: energy of one unit of balance of one layer (then no cap).
    previous: [L, E] devices, with ``max_moves`` of which at most so many experts may change; it must keep (1).
    start: [L, E] devices to begin with; greedy balance by default.
    steps: proposals per chain, the work budget, by default ``usual_steps``. generations: how often a few chains
    go on from a splice of all before; 0 for the best of the chains alone. time_limit: a ceiling in seconds,
    into which the whole schedule is squeezed when steps take too long. ``stop`` ends the search early with
    what is then found.

    Returns [L, E] devices, objective as above without the price term, bound 0; status ``time_limit`` where the schedule
    was squeezed (then ``start`` if nothing else keeps the cap). Raises ``Infeasible`` where slots are
    missing or the cap lies below the proven bound, and ``NotFound`` where no placement within the cap was found.
    """
    started = time.perf_counter()
    load_kernels()
    samples = np.asarray(load, float)
    samples = samples[None] if samples.ndim == 2 else samples
    weights = device_weight, host_weight
    devices = speeds, slots, host = _checked(samples, affinity, capacity, speed, hosts, weights)
    if balance_cap < math.inf:
        check_cap(samples, speeds, slots, balance_cap)
    if start is None:
        start = previous if previous is not None else longest_first(samples.sum(axis=0), speeds, slots)
    problem = _problem(
        affinity,
        samples,
        devices,
        weights,
        cap=balance_cap,
        price=price,
        previous=start if previous is None else previous,
        max_moves=max_moves,
        fixed_hosts=fixed_hosts,
    )
    steps = steps or usual_steps(start.size)
    planned = _planned(chains or usual_chains(steps), generations)
    costs = _costs(problem, affinity)
    deadline = started + time_limit - _judging(costs, problem, start, planned, time_limit)
    walks = Walks(problem, steps, deadline, planned, seed, stop or Event(), on_event)
    known = [start] if mean_balance(start, samples, speeds) <= balance_cap else []
    best = _walked(walks, costs, start, known)
    if best is None:
        allow = walks.coolest + idle(samples)
        message = f"found no placement with a balance of {balance_cap:.6g} or less: allow {allow:.6g}, the best"
        raise NotFound(message, in_time=not walks.squeezed)
    objective = affinity.cost(best, host, *weights)
    status: Status = "time_limit" if walks.squeezed else "feasible"
    return Solution(best, objective, 0.0, status, time.perf_counter() - started, walks.done, "annealing")


def _problem(
    affinity: Affinity,
    samples: np.ndarray,
    devices: tuple[np.ndarray, np.ndarray, np.ndarray],
    weights: tuple[float, float],
    *,
    cap: float,
    price: float,
    previous: np.ndarray,
    max_moves: int | None,
    fixed_hosts: bool,
) -> Problem:
    """In the kernel's form; samples: [S, L, E] load; devices: speed, slots and host; the rest as in ``anneal``."""
    speed, slots, host = devices
    relative = over_ideal(samples, speed)
    return Problem(
        *affinity.between(),
        load=relative if cap < math.inf or price > 0 else relative[:0],
        slots=slots,
        speed=speed,
        host=host.astype(np.int64),
        weights=(weights[0], weights[1] - weights[0]),
        cap=cap - idle(samples),
        price=price,
        previous=previous,
        max_moves=-1 if max_moves is None else max_moves,
        fixed_hosts=fixed_hosts,
    )


def _planned(chains: int, generations: int) -> tuple[int, int, int]:
    """Chains at first, in each generation that follows, and generations: one chain has nothing to splice."""
    generations = generations if chains > 1 else 0
    return chains, min(FOLLOWERS, chains) if generations else 0, generations


def _walked(walks: Walks, costs: Costs, start: np.ndarray, known: list[np.ndarray]) -> np.ndarray | None:
    """The best of all walks and of those ``known`` [L, E]: short ones, long ones, and followers of their splices."""
    problem, found = walks.problem, known + walks.scout(start)
    walks.tells(costs, found)
    chains = walks.affordable()
    _, followers, generations = walks.planned
    if not (found and (walks.late or walks.stop.is_set())):
        found += walks.run(start, THREADS if walks.late else chains, WARMEST, hold=problem.cap < math.inf)
        walks.tells(costs, found)
    while found and walks.adds_chains():
        found += walks.run(start, THREADS, WARMEST, hold=problem.cap < math.inf)
    generation = 0
    while generation < generations or walks.adds_generation():
        generation += 1
        if not found or walks.stop.is_set():
            break
        start = _spliced(costs, problem, found, walks.share(SPLICE))
        found = [start]
        walks.tells(costs, found)
        if walks.late:
            break
        found += walks.run(start, followers, SEAMS)
    if not found:
        return None
    return _spliced(costs, problem, found, walks.deadline) if generations else _best(costs, problem, found)


def _checked(
    samples: np.ndarray,
    affinity: Affinity,
    capacity: ArrayLike,
    speed: ArrayLike,
    hosts: ArrayLike,
    weights: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """speed, slots and host of the devices [G]; raises as ``anneal``."""
    for sample in samples:
        _, speeds, slots = checked(sample, speed, capacity)
    host = np.asarray(hosts)
    if host.shape != speeds.shape or host.dtype.kind not in "iu" or (host < 0).any():
        raise ValueError(f"hosts must hold a host number for each of {len(speeds)} devices, got {hosts!r}")
    if not 0 <= weights[0] <= weights[1] < math.inf:
        raise ValueError(f"weights must be 0 <= device_weight <= host_weight, got {weights[0]} and {weights[1]}")
    if samples.shape[1:] != affinity.together.shape[:2]:
        raise ValueError(f"load must be [L, E] of {list(affinity.together.shape[:2])}, got {list(samples.shape[1:])}")
    return speeds, slots, host


def usual_chains(steps: int) -> int:
    """Chains from random placements where each makes so many proposals."""
    return max(min(CHAINS, ENOUGH // steps // THREADS * THREADS), THREADS)


def _costs(problem: Problem, affinity: Affinity) -> Costs:
    groups = Groups.of(problem.slots, problem.speed, problem.host)
    return Costs(
        affinity.transitions,
        affinity.together,
        problem.weights,
        problem.load,
        problem.speed,
        groups,
        problem.fixed_hosts,
    )


def _judging(
    costs: Costs, problem: Problem, start: np.ndarray, planned: tuple[int, int, int], time_limit: float
) -> float:
    """Seconds to keep free at the end of a search with a time limit, for comparing what the planned chains find."""
    if time_limit == math.inf:
        return 0.0
    chains, followers, generations = planned
    compared = chains + generations * followers + THREADS
    began = time.perf_counter()
    costs.total(start)
    if problem.price > 0:
        costs.hottest(start)
    return min(JUDGING * compared * (time.perf_counter() - began), MOST_JUDGING * time_limit)


def _best(costs: Costs, problem: Problem, found: list[np.ndarray]) -> np.ndarray:
    """The cheapest of the placements, the price of balance included; of equals the first."""
    if len(found) == 1:
        return found[0]
    if problem.price > 0:
        return min(found, key=lambda placed: costs.total(placed) + problem.price * float(costs.hottest(placed).sum()))
    return min(found, key=costs.total)


def _spliced(costs: Costs, problem: Problem, found: list[np.ndarray], deadline: float) -> np.ndarray:
    """The best of the placements and, where experts may move at will and there is time, of the splice of all."""
    spliced = None
    if len(found) > 1 and problem.max_moves < 0:
        spliced = splice(costs, np.stack(found), problem.cap, problem.price, deadline)
    return _best(costs, problem, found if spliced is None else [*found, spliced])

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
different orders, so the best layers of all of them are spliced (``annealing_splice``), and a few chains go on from
there, only warm enough to mend the seams; again, and the best counts.

The cap's price rises while the balance lies above it and falls below it. Held to the cap at every temperature, a warm
walk would pay so much for balance that experts are stuck: short walks therefore find out what the cap costs in the end
(``Walks.scout``), the others keep that price while they are warm (Lagrangian relaxation) and follow the cap once they
are cold. Last, proposals that break (2) are refused. ``annealing_kernel`` proposes for one expert or two,
``annealing_relabel`` for whole devices. It is a heuristic; bounds are in ``affinity_bound``.
"""

# L layers, E experts, G devices, R slots, S samples

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .annealing_chain import WARMEST, Problem, load_kernels
from .annealing_relabel import Groups
from .annealing_splice import Costs, splice
from .annealing_walks import GENERATIONS, THREADS, Walks
from .balance import check_cap, checked, idle, longest_first, mean_balance, over_ideal
from .result import NotFound, Solution, Status

STEPS_PER_EXPERT, MOST_STEPS = 1_500, 50_000_000  # proposals of each chain
CHAINS, ENOUGH = 16, 80_000_000  # chains from random placements, fewer where so many proposals of all are enough
FOLLOWERS = 4  # chains after a splice
SEAMS = 0.1  # first temperature of these, over the mean traffic of an expert
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
        """[L, 3, E, E] what each expert exchanges with layers l - 1, l, l + 1, in float32 whole numbers; their unit."""
        layers, experts = len(self.together), self.together.shape[1]
        table = np.zeros((layers, 3, experts, experts))
        table[1:, 0] = self.transitions.transpose(0, 2, 1)
        table[:, 1] = self.together
        table[:-1, 2] = self.transitions
        largest = float(table.sum(axis=(1, 3)).max(initial=0.0))
        whole = np.array_equal(table, np.round(table)) and largest < EXACT
        unit = 1.0 if whole or largest == 0 else largest / EXACT
        return np.round(table / unit).astype(np.float32), unit


def pairs(expert_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """[L, E, E] tokens that chose both experts, symmetric with an empty diagonal; expert_ids: [T, L, K]."""
    layers, top_k = expert_ids.shape[1:]
    found = np.zeros((layers, num_experts**2))
    for layer in range(layers):
        ids = expert_ids[:, layer].astype(np.int64)
        for first in range(top_k):
            cells = ids[:, first, None] * num_experts + np.delete(ids, first, axis=1)
            found[layer] += np.bincount(cells.ravel(), minlength=num_experts**2)
    return found.reshape(layers, num_experts, num_experts)


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
    steps: proposals per chain, the work budget, by default ``usual_steps``. time_limit: a ceiling in seconds,
    into which the whole schedule is squeezed when steps take too long. ``stop`` ends the search early with
    what is then found.

    Returns [L, E] devices, objective as above without the price term, bound 0; status ``time_limit`` where the schedule
    was squeezed (then ``start`` if nothing else keeps the cap). Raises ``Infeasible`` where slots are
    missing or the cap lies below the proven bound, and ``NotFound`` where no placement within the cap was found.
    """
    load_kernels()
    started = time.perf_counter()
    samples = np.asarray(load, float)
    samples = samples[None] if samples.ndim == 2 else samples
    for sample in samples:
        _, speeds, slots = checked(sample, speed, capacity)
    host = np.asarray(hosts)
    if host.shape != speeds.shape or host.dtype.kind not in "iu" or (host < 0).any():
        raise ValueError(f"hosts must hold a host number for each of {len(speeds)} devices, got {hosts!r}")
    if not 0 <= device_weight <= host_weight < math.inf:
        raise ValueError(f"weights must be 0 <= device_weight <= host_weight, got {device_weight} and {host_weight}")
    if samples.shape[1:] != affinity.together.shape[:2]:
        raise ValueError(f"load must be [L, E] of {list(affinity.together.shape[:2])}, got {list(samples.shape[1:])}")
    if balance_cap < math.inf:
        check_cap(samples, speeds, slots, balance_cap)
    relative = over_ideal(samples, speeds)
    if start is None:
        start = previous if previous is not None else greedy(samples.sum(axis=0), speeds, slots)
    problem = Problem(
        *affinity.between(),
        load=relative if balance_cap < math.inf or price > 0 else relative[:0],
        slots=slots,
        speed=speeds,
        host=host.astype(np.int64),
        weights=(device_weight, host_weight - device_weight),
        cap=balance_cap - idle(samples),
        price=price,
        previous=start if previous is None else previous,
        max_moves=-1 if max_moves is None else max_moves,
        fixed_hosts=fixed_hosts,
    )
    steps = steps or usual_steps(start.size)
    chains = chains or usual_chains(steps)
    followers = min(FOLLOWERS, chains) if chains > 1 else 0
    walks = Walks(problem, steps, started + time_limit, (chains, followers), seed, stop or Event(), on_event)
    costs = _costs(problem, affinity)
    if balance_cap < math.inf:
        walks.scout(start)
    found = walks.run(start, chains, WARMEST, hold=True)
    for _ in range(GENERATIONS if followers else 0):
        if not found or walks.stop.is_set():
            break
        start = _spliced(costs, problem, found)
        found = [start, *walks.run(start, followers, SEAMS)]
    if found:
        best = _spliced(costs, problem, found)
    elif mean_balance(start, samples, speeds) <= balance_cap:
        best = start
    else:
        allow = walks.coolest + idle(samples)
        message = f"found no placement with a balance of {balance_cap:.6g} or less: allow {allow:.6g}, the best"
        raise NotFound(message, in_time=not walks.squeezed)
    objective = affinity.cost(best, host, device_weight, host_weight)
    status: Status = "time_limit" if walks.squeezed else "feasible"
    return Solution(best, objective, 0.0, status, time.perf_counter() - started, walks.done)


def usual_steps(size: int) -> int:
    """Proposals of a chain for so many layers x experts; ``benchmarks/annealing.py`` shows what more of them bring."""
    return min(STEPS_PER_EXPERT * size, MOST_STEPS)


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


def _spliced(costs: Costs, problem: Problem, found: list[np.ndarray]) -> np.ndarray:
    """The best of the placements and, where experts may move at will, of the splice of all."""

    def value(placed: np.ndarray) -> float:
        return costs.total(placed) + problem.price * float(costs.hottest(placed).sum())

    spliced = splice(costs, np.stack(found), problem.cap, problem.price) if problem.max_moves < 0 else None
    return min([*found, spliced] if spliced is not None else found, key=value)


def greedy(load: np.ndarray, speed: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """[L, E] longest-first placement; load: [L, E]."""
    return np.stack([longest_first(row, speed, capacity) for row in load])

"""Annealing: experts on devices, one copy each, so that few tokens change devices at a given balance.

    d[l, e] in devices        the device that holds expert e of layer l
    minimise  sum_l sum_{a,b} transitions[l][a][b] * weight(d[l, a], d[l+1, b])         tokens that move between layers
            + sum_l sum_{a<b} together[l][a][b]    * weight(d[l, a], d[l, b])           tokens that need both experts
            + price * sum_l hottest[l]                                                  the price of balance

    weight is 0 on one device, ``device_weight`` between devices of a host, ``host_weight`` between hosts
    hottest[l] = mean_s max_g sum_{e: d[l, e] = g} load[s][l][e] / speed[g], over the ideal of sample s

    (1) slots:    #{e: d[l, e] = g} <= capacity[g]                          kept by every proposal, ``walk``
    (2) balance:  mean_l hottest[l] <= balance_cap                          ``_Chain.steer``, then a rule of ``walk``
    (3) moves:    #{(l, e): d[l, e] != previous[l, e]} <= max_moves         a rule of ``walk``
    (4) hosts:    host(d[l, e]) = host(start[l, e]) where ``fixed_hosts``   a rule of ``walk``

Samples of the load are the risk: a placement that is balanced in *every* sample keeps its balance on tokens to come;
one that fits only their sum does not.

Simulated annealing from so warm that placements are random (Kirkpatrick et al. 1983), several chains, the best
counts. The balance cap holds throughout: its price rises while the balance lies above it and falls below it, so that
every temperature sees the constrained problem. Last, proposals that break (2) are refused. It is a heuristic; bounds
are in ``affinity_bound``.
"""

# L layers, E experts, G devices, R slots, S samples

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .annealing_kernel import FREE, LANES, fill_finish, fill_near, walk
from .balance import check_cap, checked, longest_first, mean_balance, over_ideal
from .result import NotFound, Solution, Status

STEPS_PER_EXPERT, MOST_STEPS = 5_000, 50_000_000  # proposals of each chain
THREADS = 2
FEWEST_CHAINS, CHAINS, MOST_CHAINS = THREADS, 8, 32  # of one length, more chains find deeper minima than longer ones
LARGE, SMALL = 100_000_000, 1024  # proposals of all chains together that are enough; layers x experts of cheap steps
FEWEST_EPOCHS, MOST_EPOCHS, EPOCH = 40, 240, 500  # times that the price follows the balance; steps worth one
FIRST = 10_000  # steps of the first epoch under a time limit
FINAL = 0.1  # of the epochs the cap is a rule
WARMEST = 1.0  # temperature over the mean traffic of an expert: above it placements are as good as random
COLDEST = 0.01  # nearly nothing that costs is accepted
FOLLOW = 0.2  # how fast the price follows: e-fold in 1 / FOLLOW epochs far from the cap
PRICE_RANGE = (1e-2, 1e2)  # of the price over the mean traffic of a layer
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
    steps: proposals per chain, the work budget, by default in proportion to the experts. time_limit: a ceiling in
    seconds, into which the whole schedule is squeezed when steps take too long. ``stop`` ends the search early with
    what is then found.

    Returns [L, E] devices, objective as above without the price term, bound 0; status ``time_limit`` where the schedule
    was squeezed (then ``start`` if nothing else keeps the cap). Raises ``Infeasible`` where slots are
    missing or the cap lies below the proven bound, and ``NotFound`` where no placement within the cap was found.
    """
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
    problem = _Problem(
        *affinity.between(),
        load=relative if balance_cap < math.inf or price > 0 else relative[:0],
        slots=slots,
        speed=speeds,
        host=host.astype(np.int64),
        weights=(device_weight, host_weight - device_weight),
        cap=balance_cap,
        price=price,
        previous=start if previous is None else previous,
        max_moves=-1 if max_moves is None else max_moves,
        fixed_hosts=fixed_hosts,
    )
    size = affinity.together.shape[0] * affinity.together.shape[1]
    steps = steps or min(STEPS_PER_EXPERT * size, MOST_STEPS)
    chains = chains or max(min(CHAINS, LARGE // steps), FEWEST_CHAINS, min(SMALL // size, MOST_CHAINS))
    rounds = -(-chains // THREADS)
    stop = stop or Event()
    with ThreadPoolExecutor(THREADS) as pool:
        walks = [_Chain(problem, start.copy(), seed * 7919 + i) for i in range(chains)]
        runs = []
        for i, chain in enumerate(walks):
            turn, first = i // THREADS, i % THREADS == 0
            shown = _part_of(on_event, turn, rounds) if on_event and first else None
            runs.append(pool.submit(chain.run, steps, started + time_limit, rounds - turn, stop, shown))
        try:
            found = [run.result() for run in runs]
        except KeyboardInterrupt:
            stop.set()
            found = [run.result() for run in runs]
    within = [f for f in found if f is not None]
    if within:
        best = min(within, key=lambda f: f[0])[1]
    elif mean_balance(start, samples, speeds) <= balance_cap:
        best = start
    else:
        reached = min(c.balance() for c in walks)
        raise NotFound(f"found no placement with a balance of {balance_cap:.4g} or less: allow {reached:.4g}, the best")
    objective = affinity.cost(best, host, device_weight, host_weight)
    status: Status = "time_limit" if any(c.squeezed for c in walks) else "feasible"
    return Solution(best, objective, 0.0, status, time.perf_counter() - started)


def greedy(load: np.ndarray, speed: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """[L, E] longest-first placement; load: [L, E]."""
    return np.stack([longest_first(row, speed, capacity) for row in load])


def _part_of(on_event: Callable[[dict[str, Any]], None], turn: int, turns: int) -> Callable[[dict[str, Any]], None]:
    """What a chain reports, as a part of all of them."""

    def report(event: dict[str, Any]) -> None:
        on_event(event | {"done": turn * event["of"] + event["done"], "of": turns * event["of"]})

    return report


@dataclass(frozen=True, eq=False)
class _Problem:
    """The input in the kernel's form."""

    between: np.ndarray  # [L, 3, E, E]
    unit: float  # of ``between``
    load: np.ndarray  # [S, L, E] over the ideal; no samples where balance does not count
    slots: np.ndarray
    speed: np.ndarray
    host: np.ndarray
    weights: tuple[float, float]
    cap: float
    price: float
    previous: np.ndarray
    max_moves: int
    fixed_hosts: bool


@dataclass(eq=False)
class _Chain:
    """One annealing walk; ``placed`` [L, E] is where it stands."""

    problem: _Problem
    placed: np.ndarray
    seed: int
    price: float = 0.0
    squeezed: bool = False

    def __post_init__(self) -> None:
        p, (layers, experts) = self.problem, self.placed.shape
        self.traffic = max(float(p.between.sum()) * sum(p.weights) * p.unit / (layers * experts), 1e-300)
        self.layer_traffic = self.traffic * experts
        self.price = p.price or self.layer_traffic
        self.load = np.zeros((layers, experts, -(-len(p.load) // LANES) * LANES), np.float32)
        self.load[:, :, : len(p.load)] = p.load.transpose(1, 2, 0)
        self.inverse_speed = (1.0 / p.speed).astype(np.float32)
        self.finish = np.zeros((layers, len(p.slots), self.load.shape[2]), np.float32)
        self.device_of_slot = np.repeat(np.arange(len(p.slots)), p.slots)
        self.slots, self.slot_of = _seats(self.placed, p.slots)
        self.near = np.zeros((layers, len(p.slots), experts), np.float32)
        self.near_host = np.zeros((layers, int(p.host.max()) + 1, experts), np.float32)
        fill_near(p.between, self.placed, self.near)
        fill_near(p.between, p.host[self.placed], self.near_host)
        self.moved = int((self.placed != p.previous).sum())
        # splitmix64 of the seed: xorshift must not begin with few bits set
        mixed = (self.seed + 1) * 0x9E3779B97F4A7C15 & (2**64 - 1)
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        self.state = np.array([mixed ^ mixed >> 27 or 1], np.uint64)

    def run(
        self, steps: int, deadline: float, turns: int, stop: Event, on_event: Callable[[dict[str, Any]], None] | None
    ) -> tuple[float, np.ndarray] | None:
        """The best placement that keeps the cap among the final epochs, with its energy; None where none did.

        The time up to the deadline is for as many ``turns``, of which this chain is the first.
        """
        p, layers = self.problem, len(self.placed)
        deadline = time.perf_counter() + (deadline - time.perf_counter()) / turns
        epochs = max(FEWEST_EPOCHS, min(steps // EPOCH, MOST_EPOCHS))
        cooling = math.ceil(epochs * (1 - FINAL))
        ratio = (COLDEST / WARMEST) ** (1 / cooling)
        energy, best = 0.0, None
        began, done, planned = time.perf_counter(), 0, math.ceil(steps / epochs)
        for epoch in range(epochs):
            final = epoch >= cooling
            count = self._affordable(planned, done, began, deadline, epochs - epoch, stop)
            warm = self.traffic * (COLDEST if final else WARMEST * ratio**epoch)
            cold = self.traffic * (COLDEST / 8 if final else WARMEST * ratio ** (epoch + 1))
            limit = layers * p.cap
            hard = final and self.balance() <= p.cap
            energy += self._walk(warm, cold, limit, hard, count)
            done += count
            balance = self.balance()
            if p.cap < math.inf:
                self.steer(balance)
            value = energy + p.price * balance * layers
            if final and balance <= p.cap and (best is None or value < best[0]):
                best = value, self.placed.copy()
            if on_event:
                on_event({"done": epoch + 1, "of": epochs, "what": f"balance {balance:.3f}" if balance else ""})
        return best

    def balance(self) -> float:
        """Mean hottest finish; 0 where balance does not count."""
        fill_finish(self.load, self.placed, self.inverse_speed, self.finish)
        samples = len(self.problem.load)
        return float(self.finish.max(axis=1)[:, :samples].mean()) if samples else 0.0

    def steer(self, balance: float) -> None:
        """Raise the price above the cap, lower it below."""
        p = self.problem
        push = np.clip((balance - p.cap) / max(0.2 * (p.cap - 1.0), 0.005), -1, 1)
        low, high = (edge * self.layer_traffic for edge in PRICE_RANGE)
        self.price = float(np.clip(self.price * math.exp(FOLLOW * push), low, high))

    def _walk(self, warm: float, cold: float, limit: float, hard: bool, steps: int) -> float:
        p = self.problem
        fill_finish(self.load, self.placed, self.inverse_speed, self.finish)
        gained, self.moved = walk(
            p.between,
            self.near,
            self.near_host,
            self.placed,
            self.slots,
            self.slot_of,
            self.device_of_slot,
            p.host,
            self.load,
            self.inverse_speed,
            self.finish,
            len(p.load),
            p.previous,
            p.weights[0] * p.unit,
            p.weights[1] * p.unit,
            self.price,
            limit,
            hard,
            self.moved,
            p.max_moves,
            p.fixed_hosts,
            warm,
            cold,
            steps,
            self.state,
        )
        return gained

    def _affordable(self, planned: int, done: int, began: float, deadline: float, epochs: int, stop: Event) -> int:
        """Steps of the next epoch: what is planned, or what the time still allows in equal parts."""
        if stop.is_set():
            self.squeezed = True
            return 0
        if deadline == math.inf:
            return planned
        if not done:  # how long a step takes is not known yet
            return min(planned, FIRST)
        now = time.perf_counter()
        rate = done / max(now - began, 1e-9)
        possible = max(1, int((deadline - now) * 0.95 * rate / epochs))
        self.squeezed |= possible < planned
        return min(planned, possible)


def _seats(device_of: np.ndarray, capacity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """slots [L, R] and slot_of [L, E]: every expert on a slot of its device."""
    first = np.concatenate([[0], np.cumsum(capacity)])
    slots = np.full((len(device_of), first[-1]), FREE)
    slot_of = np.empty_like(device_of)
    for row, placed in enumerate(device_of):
        order = np.argsort(placed, kind="stable")
        taken = np.bincount(placed, minlength=len(capacity))
        if (taken > capacity).any():
            device = int((taken - capacity).argmax())
            raise ValueError(f"layer {row}: device {device} holds {taken[device]} experts in {capacity[device]} slots")
        within = np.concatenate([np.arange(n) for n in taken])
        slot_of[row, order] = first[placed[order]] + within
        slots[row, slot_of[row]] = np.arange(len(placed))
    return slots, slot_of

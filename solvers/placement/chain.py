"""One walk of ``annealing``: its temperatures, the price of balance, the tables, and moves of whole devices between."""

# L layers, E experts, G devices, H hosts, R slots, S samples

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from threading import Event
from typing import Any

import numpy as np

from .kernel import walk
from .relabel import Groups, relabel
from .splice import fill_boundary
from .tables import FREE, LANES, PARTNERS, Rules, Tables, fill_finish, fill_flows, fill_near, fill_partners

FEWEST_EPOCHS, MOST_EPOCHS, EPOCH = 40, 240, 500  # times that the price follows the balance; steps worth one
FIRST, UNTIMED = 10_000, 250_000  # steps at most of the first epoch, and of those before speed is judged
LEAST_PACE = 100_000  # steps a second that even a busy machine makes
LOOK = 0.05  # of the time, before speed is judged: first moments show how threads wait
SHORTEST_LOOK, LONGEST_LOOK = 0.15, 1.0  # seconds of it, at most half of the time
WARM_STEP = 0.5  # a step at the first temperature takes so much longer than the mean of all
FINAL = 0.1  # of the epochs the cap is a rule
HELD = 0.7  # of the epochs before it, a price to be held is held
WARMEST = 0.5  # temperature over the mean traffic of an expert: above it placements are nearly as good as random
COLDEST = 0.01  # nearly nothing that costs is accepted
FOLLOW = 0.2  # how fast the price follows: e-fold in 1 / FOLLOW epochs far from the cap
PRICE_RANGE = (1e-2, 1e2)  # of the price over the mean traffic of a layer
RELABEL = 4  # epochs between moves of whole devices, or as many steps as their tables have entries


@dataclass(frozen=True, eq=False)
class Problem:
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

    # The tables that all chains share are made once.

    @cached_property
    def traffic(self) -> float:
        """Mean weighted traffic of an expert, above 0."""
        return max(float(self.between.sum()) * sum(self.weights) * self.unit / self.previous.size, 1e-300)

    @cached_property
    def partners(self) -> np.ndarray:
        """[L, E, PARTNERS]"""
        found = np.zeros((*self.previous.shape, PARTNERS), np.int32)
        fill_partners(self.between, found)
        return found

    @cached_property
    def padded_load(self) -> np.ndarray:
        """[L, E, S] with samples in multiples of LANES."""
        found = np.zeros((*self.previous.shape, -(-len(self.load) // LANES) * LANES), np.float32)
        found[:, :, : len(self.load)] = self.load.transpose(1, 2, 0)
        return found


@dataclass(eq=False)
class Chain:
    """One annealing walk; ``placed`` [L, E] is where it stands.

    price: of balance, followed from there; 0 where nothing is known of it. settled: the price when cooling ended.
    """

    problem: Problem
    placed: np.ndarray
    seed: int
    price: float = 0.0
    settled: float = 0.0
    squeezed: bool = False
    done: int = 0  # proposals

    def __post_init__(self) -> None:
        p, (layers, experts) = self.problem, self.placed.shape
        self.traffic = p.traffic
        self.layer_traffic = self.traffic * experts
        self.price = p.price or self.price or self.layer_traffic
        devices, samples = len(p.slots), -(-len(p.load) // LANES) * LANES
        slots, slot_of = _seats(self.placed, p.slots)
        self.tables = Tables(
            p.between,
            p.partners,
            p.previous,
            p.padded_load,
            len(p.load),
            (1.0 / p.speed).astype(np.float32),
            p.host,
            np.concatenate([[0], np.cumsum(p.slots)]),
            np.repeat(np.arange(devices), p.slots),
            self.placed,
            slots,
            slot_of,
            near=np.zeros((layers, devices, experts), np.float32),
            near_host=np.zeros((layers, int(p.host.max()) + 1, experts), np.float32),
            finish=np.zeros((layers, devices, samples), np.float32),
            hottest=np.zeros(layers),
            after=np.zeros(LANES, np.float32),
        )
        self.groups = Groups.of(p.slots, p.speed, p.host)
        self._fill_near(np.ones(layers, bool))
        self.moved = int((self.placed != p.previous).sum())
        # splitmix64 of the seed: xorshift must not begin with few bits set
        mixed = (self.seed + 1) * 0x9E3779B97F4A7C15 & (2**64 - 1)
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        self.state = np.array([mixed ^ mixed >> 27 or 1], np.uint64)

    def run(
        self,
        steps: int,
        deadline: float,
        turns: int,
        stop: Event,
        on_event: Callable[[dict[str, Any]], None] | None,
        warmest: float = WARMEST,
        hold: bool = False,
    ) -> np.ndarray | None:
        """The best placement that keeps the cap among the final epochs; None where none did.

        The time up to the deadline is for as many ``turns`` of one length, of which this chain has the first. warmest:
        first temperature over the mean traffic of an expert. hold: the price stays as it is while the walk is warm.
        """
        p, layers = self.problem, len(self.placed)
        deadline = time.perf_counter() + (deadline - time.perf_counter()) / turns
        epochs = max(FEWEST_EPOCHS, min(steps // EPOCH, MOST_EPOCHS))
        cooling = math.ceil(epochs * (1 - FINAL))
        ratio = (COLDEST / warmest) ** (1 / cooling)
        energy, best, lowest, relabelled = 0.0, None, math.inf, 0
        began = time.perf_counter()
        for epoch in range(epochs):
            final = epoch >= cooling
            left = epochs - epoch
            planned = math.ceil((steps - self.done) / left)
            count = self._affordable(planned, began, deadline, left, left / epochs, stop)
            if self.done and planned and not count:
                return self.placed.copy() if best is None and self.balance() <= p.cap else best
            warm = self.traffic * (COLDEST if final else warmest * ratio**epoch)
            cold = self.traffic * (COLDEST / 8 if final else warmest * ratio ** (epoch + 1))
            limit = layers * p.cap
            hard = final and self.balance() <= p.cap
            energy += self._walk(warm, cold, limit, hard, count)
            self.done += count
            if epoch % RELABEL == 0 and self.done - relabelled >= p.between.size and p.max_moves < 0:
                energy, relabelled = energy + self._relabel(cold), self.done
            balance = self.balance()
            if p.cap < math.inf and not (hold and epoch < HELD * cooling):
                self.steer(balance)
            if epoch < cooling:
                self.settled = self.price
            value = energy + p.price * balance * layers
            if final and balance <= p.cap and value < lowest:
                lowest, best = value, self.placed.copy()
            if on_event:
                on_event({"done": epoch + 1, "of": epochs, "what": f"balance {balance:.3f}" if balance else ""})
        return best

    def balance(self) -> float:
        """Mean hottest finish; 0 where balance does not count."""
        self._fill_finish()
        samples = len(self.problem.load)
        return float(self.tables.finish.max(axis=1)[:, :samples].mean()) if samples else 0.0

    def steer(self, balance: float) -> None:
        """Raise the price above the cap, lower it below."""
        p = self.problem
        push = np.clip((balance - p.cap) / max(0.2 * (p.cap - 1.0), 0.005), -1, 1)
        low, high = (edge * self.layer_traffic for edge in PRICE_RANGE)
        self.price = float(np.clip(self.price * math.exp(FOLLOW * push), low, high))

    def _walk(self, warm: float, cold: float, limit: float, hard: bool, steps: int) -> float:
        self._fill_finish()
        gained, self.moved = walk(self.tables, self._rules(limit, hard), self.moved, warm, cold, steps, self.state)
        return gained

    def _rules(self, limit: float = math.inf, hard: bool = False) -> Rules:
        p = self.problem
        device_cost, host_cost = (weight * p.unit for weight in p.weights)
        return Rules(device_cost, host_cost, self.price, limit, hard, p.max_moves, p.fixed_hosts)

    def _relabel(self, temperature: float) -> float:
        """Whole devices and hosts change places in runs of layers; the energy gained."""
        p, (layers, devices) = self.problem, (len(self.placed), len(self.problem.slots))
        flows = np.zeros((layers - 1, devices, devices))
        fill_flows(p.between, self.placed, flows)
        label = np.tile(np.arange(devices), (layers, 1))
        gained = relabel(flows, label, self.groups, self._rules(), temperature, layers * devices, self.state)
        moved = (label != np.arange(devices)).any(axis=1)
        if moved.any():
            self.placed[:] = np.take_along_axis(label, self.placed, axis=1)
            self.tables.slots[:], self.tables.slot_of[:] = _seats(self.placed, p.slots)
            stale = moved.copy()  # an expert's own layer and the adjacent ones are near
            stale[1:] |= moved[:-1]
            stale[:-1] |= moved[1:]
            self._fill_near(stale)
        return gained

    def _fill_near(self, stale: np.ndarray) -> None:
        between, host = self.problem.between, self.problem.host
        fill_near(between, self.placed, self.tables.near, stale)
        fill_near(between, host[self.placed], self.tables.near_host, stale)

    def _fill_finish(self) -> None:
        fill_finish(self.tables.load, self.placed, self.tables.inverse_speed, self.tables.finish)

    def _affordable(self, planned: int, began: float, deadline: float, epochs: int, warmth: float, stop: Event) -> int:
        """Steps of the next epoch: what is planned, or what the time still allows in parts; warmth: 1 at first, last 0.

        Warm steps take longer, as more of them are accepted: what the first ones took is no measure of the rest.
        """
        if stop.is_set():
            self.squeezed = True
            return 0
        if not self.done:  # how long a step takes is not known yet
            return min(planned, FIRST)
        if deadline == math.inf:
            return planned
        now = time.perf_counter()
        if now >= deadline:
            self.squeezed = True
            return 0
        whole = deadline - began
        if now - began < min(max(LOOK * whole, SHORTEST_LOOK), whole / 2, LONGEST_LOOK):
            return min(planned, UNTIMED, max(FIRST, int(whole * LEAST_PACE)))
        rate = self.done / (now - began)
        possible = max(1, int((deadline - now) * 0.95 * rate / epochs * (1 + WARM_STEP * warmth)))
        self.squeezed |= possible < planned
        return min(planned, possible)


@cache
def load_kernels() -> None:
    """Load the compiled kernels, or compile them, so that the first steps of a search are not taken for slow ones."""
    layers, experts = 2, 4
    between = np.zeros((layers, 3, experts, experts), np.float32)
    between[0, 2] = between[1, 0] = 1.0
    problem = Problem(
        between,
        1.0,
        load=np.ones((1, layers, experts)),
        slots=np.full(2, 2),
        speed=np.ones(2),
        host=np.arange(2),
        weights=(1.0, 0.0),
        cap=math.inf,
        price=1.0,
        previous=np.zeros((layers, experts), np.int64),
        max_moves=-1,
        fixed_hosts=False,
    )
    chain = Chain(problem, np.tile(np.array([0, 0, 1, 1]), (layers, 1)), 0)
    chain.run(EPOCH, math.inf, 1, Event(), None)
    fill_boundary(np.ones((experts, experts)), chain.placed[0], chain.placed[1], np.zeros((2, 2)))


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

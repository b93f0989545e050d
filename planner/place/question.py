"""What `solve` asks `place` for, and how a candidate answers: the objective is stated in ``inside``."""

# C classes of layers, T tokens of a class, K top-k, E experts, G devices

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ...solvers.balance import balance, balance_bound
from ...solvers.placement.fan_out import places
from ...solvers.result import Status
from ...solvers.slots import Slots
from ...spec.routing import COPY_PHASES
from .fleet import Fleet

MOST_CELLS = 2**26  # of the tables that say which copy serves a token: devices x experts x phases
WORTH = 0.01  # of the ideal: cooler by less, copies are no option
Proof = Callable[[], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Question:
    """What to place: ids per class [T, K]; counts [C, E] tokens; load [C, E] their seconds at speed 1; ideal [C].

    weights: (inside, between) seconds of a layer's exchange per mean device of a token.
    """

    ids: tuple[np.ndarray, ...]
    counts: np.ndarray
    load: np.ndarray
    fleet: Fleet
    weights: tuple[float, float]
    ideal: np.ndarray

    @property
    def experts(self) -> int:
        return self.load.shape[1]

    def seconds(self, device_of: np.ndarray) -> np.ndarray:
        """[C] the objective of single copies [C, E]."""
        (inside, between), hosts = self.weights, self.fleet.hosts
        found = self.ideal * balance(device_of, self.load, self.fleet.speed)
        for c, (row, ids) in enumerate(zip(device_of, self.ids, strict=True)):
            found[c] += inside * places(row, ids).mean() + (between - inside) * places(hosts[row], ids).mean()
        return found

    def copies_may_cool(self, single: Slots) -> bool:
        """Whether copies may be worth their while in any class: the hottest device is never cooler than the ideal."""
        ideal = self.load.sum(1) / self.fleet.speed.sum()
        return bool((single.hottest(self.load, self.fleet.speed) > (1 + WORTH) * ideal).any())

    def least(self) -> np.ndarray:
        """[C] no single copies have less: a token's experts fit on so few devices, and so cool is the hottest."""
        (inside, between), fleet = self.weights, self.fleet
        host_capacity = np.bincount(fleet.hosts, fleet.capacity)
        of_token = [(ids >= 0).sum(1) for ids in self.ids]  # identity experts need no device
        devices, hosts = (
            np.array([(-(-count // int(largest.max()))).mean() for count in of_token])
            for largest in (fleet.capacity, host_capacity)
        )
        ideal = np.maximum(self.load.sum(1), 1e-300) / fleet.speed.sum()
        cool = np.array([balance_bound(row, fleet.speed, fleet.capacity) for row in self.load]) / ideal
        return inside * devices + (between - inside) * hosts + self.ideal * np.maximum(cool, 1.0)


@dataclass(frozen=True, eq=False)
class Placed:
    """A candidate and how sure it is; proof: (objective, bound) [C] of what ``minimised`` names, made when asked."""

    slots: Slots
    solver: str
    minimised: str
    proof: Proof = field(repr=False)
    near: bool = False  # copies without shares: tokens go to the nearest

    @property
    def single(self) -> bool:
        return bool((self.slots.copies == 1).all())


def said(solver: str, status: Status) -> str:
    """The solver's name, and whether the clock ended it: another run may then find something else."""
    return f"{solver}, cut short by the time limit" if status == "time_limit" else solver


def fits_tables(devices: int, experts: int) -> bool:
    """Whether copies are searched for: predictions need a table of which copy serves whom."""
    return devices * experts * COPY_PHASES <= MOST_CELLS

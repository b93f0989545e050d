"""How much a placement of single copies moves, and the proof of how little any other could."""

# S samples, L layers, E experts

import math
from typing import NamedTuple

import numpy as np

from ...solvers.placement.affinity import Affinity
from ...solvers.placement.crossings import crossings, host_weights
from ...solvers.slots import Slots
from ...spec.placement import PlacementDevice
from ...spec.trace import Trace
from ..budget import Budget
from .layers import document_layers
from .score import score
from .single import Single

ROUNDING = 1e-9  # of what all tokens would pay if all moved: less is no movement, but what smoothing left


class Capped(NamedTuple):
    """What placements had to keep: a mean balance over load [S, L, E] of ``cap`` at most."""

    load: np.ndarray
    cap: float


class Movement(NamedTuple):
    """What was minimised and how much of it is left; bounds: by name, no placement under the cap has less."""

    minimised: str
    value: float
    bounds: dict[str, float]


def moves_between_layers(
    single: Single, affinity: Affinity, placed: np.ndarray, capped: Capped | None, budget: Budget, counted: bool = False
) -> Movement:
    """Of placed [L, E], in moves per boundary and token, as ``affinity`` has the traffic of tokens to come."""
    # Imported when it is needed: its compiled loops take a second to load.
    from ...solvers.bounds.crossings import affinity_bounds

    inside, between = single.weights
    hosts, fleet = single.fleet.hosts, single.fleet
    counts = affinity.transitions / len(affinity.transitions)
    minimised, value = moved_between_layers(single, affinity, placed, counted)

    def tell(bound: float) -> None:
        # What the search keeps to beside its cap can put the bound above what was found: they meet there.
        budget.tell(what="proving how much could be saved", incumbent=value, bound=min(bound, value))

    bounds = affinity_bounds(
        counts,
        fleet.capacity,
        hosts,
        inside,
        between,
        speed=fleet.speed,
        samples=None if capped is None else capped.load,
        balance_cap=math.inf if capped is None else capped.cap,
        time_limit=max(budget.left, 1e-9),
        on_bound=tell,
    )
    return Movement(minimised, value, bounds)


def moved_between_layers(
    single: Single, affinity: Affinity, placed: np.ndarray, counted: bool = False
) -> tuple[str, float]:
    """(what it is, the moves of placed [L, E] per boundary and token); counted: the traffic is not smoothed."""
    inside, between = single.weights
    counts = affinity.transitions / len(affinity.transitions)
    minimised = f"{inside:g} x boundary_cross_device + {between - inside:g} x boundary_cross_host, " + (
        "as counted on the fitted part" if counted else "as the fitted part lets expect of tokens to come"
    )
    value = crossings(placed, counts, host_weights(single.fleet.hosts, inside, between))
    return minimised, value if value > ROUNDING * between else 0.0


def fan_out(trace: Trace, single: Single, placed: np.ndarray) -> Movement:
    """Of placed [L, E], in devices and hosts per layer and token; a place holds only so many of a token's experts."""
    inside, between = single.weights
    fleet = single.fleet
    devices = tuple(
        PlacementDevice(host=fleet.names[h], speed=float(s), capacity=int(c))
        for h, s, c in zip(fleet.hosts, fleet.speed, fleet.capacity, strict=True)
    )
    found = score(document_layers(Slots.from_device_of(placed, fleet.capacity)), devices, trace)
    assert found.fanout_device is not None
    assert found.fanout_host is not None
    value = inside * found.fanout_device + (between - inside) * found.fanout_host
    host_capacity = np.bincount(fleet.hosts, fleet.capacity)
    least = [-(-trace.top_k // int(largest.max())) for largest in (fleet.capacity, host_capacity)]
    minimised = f"{inside:g} x fanout_device + {between - inside:g} x fanout_host, on the fitted part"
    return Movement(minimised, value, {"slots": inside * least[0] + (between - inside) * least[1]})

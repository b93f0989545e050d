"""Whether to move experts now, and which: what is gained over a horizon, less what moving costs, as large as possible.

    v[l, o]      balance of layer l under option o: the hottest device over the ideal, mean over windows of the traffic
    loads[l, o]  copies that devices must load for it; option 0 is what serves now, with none
    maximise     a * keep * sum_l (v[l, 0] - v[l, o_l]) - sum_l second[l] * loads[l, o_l] - pause * [anything moves]
    (1) moves:   sum_l loads[l, o_l] <= limit

    a = horizon * expert_share / sum_l v[l, 0]: every layer waits for its hottest device, so that this is the time that
    goes into experts over the horizon, per unit of balance. second[l]: the bytes of one expert over the link's rate,
    one copy after the other; they and the pause are counted as if nothing were served meanwhile.

A placement looks better on the traffic that it was fitted on than on what comes. ``keep``, 0 to 1, is how much of the
fitted gain is left on traffic that was not fitted: the windows are divided in two, each half is decided for and judged
on the other. Options of a layer are the coolest placements found for each number of loads (``place.replan``); among
them the choice is exact, by dynamic programming (``solvers.replication.moves.choose``).
"""

# W windows, B batches, L layers, E experts, G devices

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...solvers.balance import over_ideal
from ...solvers.slots import EMPTY, Slots
from ..budget import Budget
from ..place.fleet import Fleet
from ..place.replan import Replan, renamed

if TYPE_CHECKING:
    from ...solvers.replication.moves import Option

WINDOWS = 8
"""Parts of the traffic, consecutive batches together: few tokens are unbalanced by chance under any placement."""
NEW_TIME = 0.4  # of a search's time goes to the placement that moves lead to


@dataclass(frozen=True)
class Prices:
    """horizon: seconds that a placement serves for; expert_share: of serving time is spent on experts, waiting for the
    hottest device included; move_seconds: [L] to load one copy of an expert of that layer; pause: seconds, once."""

    horizon: float
    expert_share: float
    move_seconds: np.ndarray
    pause: float


@dataclass(frozen=True)
class Terms:
    """Under what rules experts move: ``limit`` loads in all (none: any number), groups of experts that stay on a host,
    full: no slot may become empty."""

    limit: int | None = None
    groups: int = 1
    full: bool = False
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Decision:
    """slots: the new placement, None to keep the old one. moves: copies that are loaded. before, after: mean balance
    now, and as expected on traffic to come. keep: as above. gain, cost: seconds over the horizon of the best that was
    found, also where it is not worth it."""

    slots: Slots | None
    moves: int
    before: float
    after: float
    keep: float
    gain: float
    cost: float


def decide(old: Slots, batches: np.ndarray, fleet: Fleet, prices: Prices, terms: Terms, budget: Budget) -> Decision:
    """The best option by the traffic in ``batches`` [B, L, E], at least two of them, in order of time.

    ``old`` lies in the slots of the fleet. budget: a ceiling; work is counted in steps. Copies take even shares.
    """
    if batches.ndim != 3 or len(batches) < 2:
        raise ValueError(f"batches must be [2 or more, layers, experts], got {list(batches.shape)}")
    load = np.stack([part.sum(axis=0) for part in np.array_split(batches, min(WINDOWS, len(batches)))])
    keep = _kept(old, load, fleet, prices, terms, budget)
    ways = _ways(old, load, fleet, terms, budget)
    layers = ways.options
    picked = best(layers, prices, keep, terms.limit)
    before = sum(layer[0].value for layer in layers)
    cooler = keep * sum(layer[0].value - layer[n].value for layer, n in zip(layers, picked, strict=True))
    loads = [layer[n].loads for layer, n in zip(layers, picked, strict=True)]
    gain = worth(layers, prices) * cooler
    cost = float(np.dot(loads, prices.move_seconds)) + (prices.pause if any(loads) else 0.0)
    moving = gain > cost and any(loads)
    count = len(layers)
    return Decision(
        ways.taking(layers, picked) if moving else None,
        sum(loads) if moving else 0,
        before / count,
        (before - cooler) / count if moving else before / count,
        keep,
        gain,
        cost,
    )


def worth(layers: list[list["Option"]], prices: Prices) -> float:
    """``a`` above: seconds for each unit that the sum of the layers' balance falls by."""
    return prices.horizon * prices.expert_share / max(sum(layer[0].value for layer in layers), 1e-300)


def best(layers: list[list["Option"]], prices: Prices, keep: float, limit: int | None) -> list[int]:
    """Number of the option of each layer that maximises gain less cost, the pause left out (it is paid once)."""
    # Imported when it is needed: its compiled loops take a second to load.
    from ...solvers.replication.moves import choose

    price = worth(layers, prices) * keep
    paid = [
        [option._replace(value=price * option.value + seconds * option.loads) for option in layer]
        for layer, seconds in zip(layers, prices.move_seconds.tolist(), strict=True)
    ]
    most = sum(max(option.loads for option in layer) for layer in layers)
    return choose(paid, most if limit is None else min(limit, most))


def _kept(old: Slots, load: np.ndarray, fleet: Fleet, prices: Prices, terms: Terms, budget: Budget) -> float:
    """``keep``: what is decided for every second window, on the others, and the other way round; load: [W, L, E]."""
    fitted = held = 0.0
    for half in (0, 1):
        part = budget.part((1 / 3, 1 / 2)[half])
        mine, others = load[half::2], over_ideal(load[1 - half :: 2], fleet.speed)
        layers = _ways(old, mine, fleet, terms, part).options
        for number, (layer, n) in enumerate(zip(layers, best(layers, prices, 1.0, terms.limit), strict=True)):
            if n:
                fitted += layer[0].value - layer[n].value
                was, now = (_hottest(option.at, others[:, number], fleet) for option in (layer[0], layer[n]))
                held += was - now
    return float(np.clip(held / fitted, 0.0, 1.0)) if fitted > 0 else 0.0


def _hottest(at: np.ndarray, load: np.ndarray, fleet: Fleet) -> float:
    """Mean over windows of the hottest device; at: [R], load: [W, E] over the ideal. Copies take even shares."""
    there = np.flatnonzero(at != EMPTY)
    device = np.repeat(np.arange(len(fleet.capacity)), fleet.capacity)[there]
    tokens = load[:, at[there]] / np.bincount(at[there], minlength=load.shape[1])[at[there]]
    return float(np.mean([(np.bincount(device, t, len(fleet.speed)) / fleet.speed).max() for t in tokens]))


def _ways(old: Slots, load: np.ndarray, fleet: Fleet, terms: Terms, budget: Budget) -> Replan:
    """From the old placement towards one for ``load`` [W, L, E]."""
    # Imported when it is needed, as above.
    from ...solvers.replication.replicate import replicate

    new = replicate(
        load,
        fleet.speed,
        fleet.capacity,
        fleet.hosts,
        groups=terms.groups,
        full=terms.full,
        seed=terms.seed,
        time_limit=budget.part(NEW_TIME).left,
    ).assignment
    apart = terms.groups > 1
    new = renamed(old, new, fleet, each_layer=True, hosts_apart=apart)
    return Replan(old, new, load, fleet, apart, terms.full, terms.seed, budget, terms.limit)

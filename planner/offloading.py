"""Plans with experts beyond memory: what stays, what is read ahead, and how many places there are for what is read.

Of a placement (every expert on one device) each device keeps as many experts in memory as fit, of all layers together
those that a step most likely needs; p = 1 - (1 - f)^T for T tokens that choose an expert with frequency f each, by the
trace where there is one. It reads ahead what is needed with probability ``Tiers.ahead`` at least: by the same p, or, by
a trace of tokens, as foreseen from what the layer before needs (``foresight``), if that is faster. More places let
reading go on while experts are computed, and take memory from those that stay. In layers with a shortcut every slot is
tried: late, more is read by then; early, the way back is hidden.

Where experts rest in the memory of a GPU's host, its processor may compute those of few rows there, in every layer up
to the number of rows with which the layer is done first (``Step.hosting``), if the step is faster with it.

Bound: whatever stays, a device that needs A of its experts in a step and keeps at most n reads A - n of them, or has
its host compute them meanwhile.
"""

# L mixture-of-experts layers, E experts, G devices

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..spec.foresight import Foresight
from ..spec.plan import LayerPlan
from ..spec.shortcut import slots
from .budget import Budget
from .foresight import can_foresee, follows, foresight_of, other_tokens
from .options import Options
from .step import Step
from .strategies.offload import expert_bytes, least_host_seconds, read_seconds
from .whole import Whole, missing

PLACES = (2, 4, 8, 1, 16)
AHEAD = (0.9, 0.7, 0.5, 0.3)  # probabilities
NOTHING = 2.0  # ahead
LEAST_TOKENS = 64  # of a trace, that what follows what is read from
ALIKE = 3  # decimals of probabilities, beyond which experts of different layers count alike


class Tiers(NamedTuple):
    """places: for experts that are read; ahead: least probability of those that are read ahead; slot: of layers with a
    shortcut, that or their last; foreseen: whether probabilities are those given what the layer before needs; hosted:
    whether hosts compute."""

    places: int = PLACES[0]
    ahead: float = AHEAD[0]
    slot: int = 0
    foreseen: bool = False
    hosted: bool = False


class Alternative(NamedTuple):
    """A placement by the name of its method, what stays and is read under it, and what that costs."""

    method: str
    tiers: Tiers
    step: Step
    whole: Whole


@dataclass
class Offloading:
    """bound: on every plan that was looked at, with whatever stays. limits: [G] bytes."""

    options: Options
    limits: Sequence[int]
    budget: Budget
    bound: float = field(init=False, default=np.inf)
    _following: tuple[np.ndarray, int] | None = field(init=False, default=None)

    def plans(self, steps: Iterable[tuple[str, Step]]) -> Iterator[tuple[str, Alternative]]:
        """In each named layout every placement, and the best of them with other tiers; until time is over."""
        for layout, step in steps:
            found: list[Alternative] = []
            for alternative in self._alternatives(step, found):
                found.append(alternative)
                yield layout, alternative
                if self.budget.over:
                    return

    def _alternatives(self, step: Step, found: list[Alternative]) -> Iterator[Alternative]:
        for method in self._placements:
            self.bound = min(self.bound, self._least(step, method))
            yield self._alternative(step, method, Tiers())
        others: tuple[Callable[[Tiers], list[Tiers]], ...] = (
            lambda tiers: [tiers._replace(slot=slot) for slot in range(1, self._slots)],
            lambda tiers: [tiers._replace(places=places) for places in PLACES[1:]],
            lambda tiers: [tiers._replace(ahead=ahead) for ahead in (*AHEAD[1:], NOTHING)],
            lambda tiers: [tiers._replace(ahead=ahead, foreseen=True) for ahead in AHEAD],
            lambda tiers: [tiers._replace(hosted=True), Tiers(tiers.places, NOTHING, tiers.slot, hosted=True)],
        )
        for more in others:
            best = min(found, key=lambda a: (a.whole.missing.sum(), a.whole.seconds))
            for tiers in more(best.tiers):
                if self._makes_sense(best, tiers):
                    yield self._alternative(step, best.method, tiers)

    def _makes_sense(self, best: Alternative, tiers: Tiers) -> bool:
        """Whether anything rests and, as far as these tiers ask for it, it can be foreseen, or computed by a host."""
        step = best.step
        if (tiers.foreseen or tiers.hosted) and not any(step.places):
            return False
        if tiers.hosted and not np.isfinite(self._host_seconds).any():
            return False
        return not tiers.foreseen or self._follows(step) is not None

    @cached_property
    def _host_seconds(self) -> np.ndarray:
        """[G] of any expert of any layer that a device's host computes, at least."""
        return least_host_seconds(self.options.costs, self.options.model.blocks)

    @cached_property
    def _placements(self) -> dict[str, list[LayerPlan]]:
        """Of each method one plan for every layer; a device's experts need not fit into its memory."""
        options = self.options
        anything = np.full((len(options.classes.members), options.costs.devices), 2**60)
        found = options.ep(options.costs.devices, anything, thorough=False)
        return {method: options.classes.spread(plans) for method, plans in found.items()}

    def _follows(self, step: Step) -> tuple[np.ndarray, int] | None:
        """[L - 1, E, E] probabilities of what follows what, and of how many tokens they are known; None where the trace
        does not say, or they are too many for a plan."""
        options, experts = self.options, self.options.moe.num_experts
        if not can_foresee(options.trace, experts):
            return None
        if self._following is None:
            assert options.trace is not None
            others = other_tokens(options.trace, step.layout.workload, options.seed)
            self._following = follows(others, experts), len(others)
        return self._following if self._following[1] >= LEAST_TOKENS else None

    def _foresight(self, step: Step, plans: Sequence[LayerPlan], tiers: Tiers) -> Foresight | None:
        """Of plans that say what rests."""
        known = self._follows(step) if tiers.foreseen else None
        return foresight_of(*known, plans, tiers.ahead) if known is not None else None

    @property
    def _slots(self) -> int:
        """The most of any layer."""
        return max(slots(block) for block in self.options.model.blocks)

    @cached_property
    def _needed(self) -> np.ndarray:
        """[L, E] probability that a step needs an expert."""
        options, trace = self.options, self.options.trace
        tokens = len(options.routing.expert_ids)
        if trace is None:
            often = options.counts / tokens
        elif trace.counts_only:
            often = np.asarray(trace.expert_counts, float)
            often = often / np.maximum(often.sum(1, keepdims=True), 1) * options.moe.top_k * options.moe.expert_share
        else:
            often = trace.expert_counts / trace.tokens
        return needs(often, tokens)

    def _alternative(self, step: Step, method: str, tiers: Tiers) -> Alternative:
        placed = self._placements[method]
        stays = [
            kept(self._needed, [plan.slots[g] for plan in placed], most)
            for g, most in enumerate(self._most_resident(step, method, tiers, max(self._sizes)))
        ]
        layers = [self._layer(j, plan, [of[j] for of in stays], tiers) for j, plan in enumerate(placed)]
        resting = [any(len(of[j]) < len(plan.slots[g]) for j, plan in enumerate(placed)) for g, of in enumerate(stays)]
        places = tuple(tiers.places if rests else 0 for rests in resting)
        step = replace(step, places=places, foresight=self._foresight(step, layers, tiers))
        if tiers.hosted:
            layers = step.hosting(layers)
            for j, layer in enumerate(layers):
                self.options.also(j, placed[j], layer)
        lacks = missing(step, layers, len(step.model.layers), list(self.limits))
        return Alternative(method, tiers, step, Whole(layers, step.seconds(layers), lacks))

    def _layer(self, ordinal: int, plan: LayerPlan, stays: Sequence[set[int]], tiers: Tiers) -> LayerPlan:
        """A layer's plan; stays: of each device."""
        needed = self._needed[ordinal]
        least = NOTHING if ordinal and tiers.foreseen else tiers.ahead
        early = [likely(needed, held, keeps, least) for held, keeps in zip(plan.slots, stays, strict=True)]
        resident = (tuple(e for e in held if e in keeps) for held, keeps in zip(plan.slots, stays, strict=True))
        slot = min(tiers.slot, slots(self.options.model.moe_block(ordinal)) - 1)
        decided = {"resident": tuple(resident), "ahead": tuple(early), "slot": slot}
        made = plan.model_copy(update={"strategy": "offload", **decided})
        self.options.also(ordinal, plan, made)
        return made

    @cached_property
    def _sizes(self) -> list[int]:
        """[L] bytes of an expert."""
        model, dtype = self.options.model, self.options.costs.dtype
        return [model.computed_expert_bytes(j, dtype) for j in range(len(model.moe_layers))]

    def _most_resident(self, step: Step, method: str, tiers: Tiers, size: int) -> list[int]:
        """[G] experts of so many bytes that stay at most, beside places and tables for all that might rest."""
        nothing = {"strategy": "offload", "resident": ((),) * len(self.limits), "ahead": ((),) * len(self.limits)}
        placed = [plan.model_copy(update=nothing) for plan in self._placements[method]]
        step = replace(step, places=(tiers.places,) * len(self.limits), foresight=self._foresight(step, placed, tiers))
        held = step.memory(placed, len(step.model.layers), self.limits)
        return [max(0, m.limit - m.total) // size for m in held]

    def _least(self, step: Step, method: str) -> float:
        """Seconds that the reading of any plan with this placement takes at least."""
        seconds = read_seconds(step.costs, expert_bytes(step.costs, step.layers))
        rate = 1 / seconds + 1 / self._host_seconds  # both go on side by side
        seconds = np.divide(1.0, rate, out=np.full(len(rate), np.inf), where=rate > 0)
        active = np.zeros(len(self.limits), int)
        layers = (layer for layer in step.layers if layer.block.moe)
        for layer, plan in zip(layers, self._placements[method], strict=True):
            active += (layer.choices.dispatch([plan]).experts.devices[0] > 0).sum(1)
        short = np.maximum(active - np.array(self._most_resident(step, method, Tiers(places=0), min(self._sizes))), 0)
        return float((short * np.where(short > 0, seconds, 0.0)).max())


def needs(often: np.ndarray, tokens: int) -> np.ndarray:
    """Probability that any of so many tokens needs what one chooses with the frequency ``often``."""
    return 1 - (1 - np.minimum(often, 1.0)) ** tokens


def likely(needed: np.ndarray, held: Sequence[int], stays: set[int], least: float) -> tuple[int, ...]:
    """Of the experts that a device holds, those that do not stay and are needed with a probability of at least
    ``least``, likeliest first; needed: [E]."""
    found = [e for e in held if e not in stays and needed[e] >= least]
    return tuple(sorted(found, key=lambda e: (-needed[e], e)))


def kept(needed: np.ndarray, held: Sequence[Sequence[int]], most: int) -> list[set[int]]:
    """[L] the ``most`` experts of a device that are most likely needed; held: [L] its experts; needed: [L, E].

    Of layers whose experts are as likely, each keeps as many.
    """
    order = []
    for j, experts in enumerate(held):
        ranked = sorted(experts, key=lambda e: (-needed[j, e], e))
        order += [(-round(float(needed[j, e]), ALIKE), rank, j, e) for rank, e in enumerate(ranked)]
    stays: list[set[int]] = [set() for _ in held]
    for *_, j, e in sorted(order)[:most]:
        stays[j].add(e)
    return stays

"""Plans with experts beyond memory: what stays, what is read ahead, and how many places there are for what is read.

Of a placement (every expert on one device) each device keeps as many experts in memory as fit, of all layers together
those that a step most likely needs; p = 1 - (1 - f)^T for T tokens that choose an expert with frequency f each, by the
trace where there is one. It reads ahead what is needed with probability ``Tiers.ahead`` at least. More places let
reading go on while experts are computed, and take memory from those that stay.

Bound: whatever stays, a device that needs A of its experts in a step and keeps at most n reads A - n of them.
"""

# L mixture-of-experts layers, E experts, G devices

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..spec.plan import LayerPlan
from .budget import Budget
from .options import Options
from .step import Step
from .strategies.offload import expert_bytes, read_seconds
from .whole import Whole, missing

PLACES = (2, 4, 8, 1, 16)
AHEAD = (0.9, 0.5, 2.0)  # the last: nothing
ALIKE = 3  # decimals of probabilities, beyond which experts of different layers count alike


class Tiers(NamedTuple):
    """places: for experts that are read; ahead: least probability of those that are read ahead."""

    places: int = PLACES[0]
    ahead: float = AHEAD[0]


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
            lambda tiers: [Tiers(places, tiers.ahead) for places in PLACES[1:]],
            lambda tiers: [Tiers(tiers.places, ahead) for ahead in AHEAD[1:]],
        )
        for more in others:
            best = min(found, key=lambda a: (a.whole.missing.sum(), a.whole.seconds))
            for tiers in more(best.tiers):
                yield self._alternative(step, best.method, tiers)

    @cached_property
    def _placements(self) -> dict[str, list[LayerPlan]]:
        """Of each method one plan for every layer; a device's experts need not fit into its memory."""
        options = self.options
        anything = np.full((len(options.classes.members), options.costs.devices), 2**60)
        found = options.ep(options.costs.devices, anything, thorough=False)
        return {method: options.classes.spread(plans) for method, plans in found.items()}

    @cached_property
    def _needed(self) -> np.ndarray:
        """[L, E] probability that a step needs an expert."""
        options, trace = self.options, self.options.trace
        tokens = len(options.routing.expert_ids)
        if trace is None:
            often = options.counts / tokens
        elif trace.counts_only:
            often = np.asarray(trace.expert_counts, float)
            often = often / np.maximum(often.sum(1, keepdims=True), 1) * options.moe.top_k
        else:
            ids = trace.expert_ids
            experts = options.moe.num_experts
            counts = [np.bincount(ids[:, j].ravel(), minlength=experts) for j in range(trace.layers)]
            often = np.stack(counts) / trace.tokens
        return 1 - (1 - np.minimum(often, 1.0)) ** tokens

    def _alternative(self, step: Step, method: str, tiers: Tiers) -> Alternative:
        placed = self._placements[method]
        stays = [
            kept(self._needed, [plan.slots[g] for plan in placed], room)
            for g, room in enumerate(self._rooms(step, method, tiers.places, max(self._sizes)))
        ]
        layers = [self._layer(j, plan, [of[j] for of in stays], tiers.ahead) for j, plan in enumerate(placed)]
        resting = [any(len(of[j]) < len(plan.slots[g]) for j, plan in enumerate(placed)) for g, of in enumerate(stays)]
        step = replace(step, places=tuple(tiers.places if rests else 0 for rests in resting))
        lacks = missing(step, layers, len(step.model.layers), list(self.limits))
        return Alternative(method, tiers, step, Whole(layers, step.seconds(layers), lacks))

    def _layer(self, ordinal: int, plan: LayerPlan, stays: Sequence[set[int]], ahead: float) -> LayerPlan:
        """A layer's plan; stays: of each device."""
        needed = self._needed[ordinal]
        early = [
            sorted((e for e in held if e not in keeps and needed[e] >= ahead), key=lambda e: (-needed[e], e))
            for held, keeps in zip(plan.slots, stays, strict=True)
        ]
        tiers = {
            "resident": tuple(
                tuple(e for e in held if e in keeps) for held, keeps in zip(plan.slots, stays, strict=True)
            ),
            "ahead": tuple(map(tuple, early)),
        }
        made = plan.model_copy(update={"strategy": "offload", **tiers})
        self.options.also(ordinal, plan, made)
        return made

    @cached_property
    def _sizes(self) -> list[int]:
        """[L] bytes of an expert."""
        model, dtype = self.options.model, self.options.costs.dtype
        return [model.computed_expert_bytes(j, dtype) for j in range(len(model.moe_layers))]

    def _rooms(self, step: Step, method: str, places: int, size: int) -> list[int]:
        """[G] experts of so many bytes that stay at most, beside so many places."""
        nothing = {"strategy": "offload", "resident": ((),) * len(self.limits), "ahead": ((),) * len(self.limits)}
        placed = [plan.model_copy(update=nothing) for plan in self._placements[method]]
        step = replace(step, places=(places,) * len(self.limits))
        held = step.memory(placed, len(step.model.layers), self.limits)
        return [max(0, m.limit - m.total) // size for m in held]

    def _least(self, step: Step, method: str) -> float:
        """Seconds that the reading of any plan with this placement takes at least."""
        seconds = read_seconds(step.costs, expert_bytes(step.costs, step.layers))
        active = np.zeros(len(self.limits), int)
        layers = (layer for layer in step.layers if layer.block.moe)
        for layer, plan in zip(layers, self._placements[method], strict=True):
            active += (layer.choices.dispatch([plan]).experts.devices[0] > 0).sum(1)
        short = np.maximum(active - np.array(self._rooms(step, method, 0, min(self._sizes))), 0)
        return float((short * np.where(short > 0, seconds, 0.0)).max())


def kept(needed: np.ndarray, held: Sequence[Sequence[int]], room: int) -> list[set[int]]:
    """[L] the ``room`` experts of a device that are most likely needed; held: [L] its experts; needed: [L, E].

    Of layers whose experts are as likely, each keeps as many.
    """
    order = []
    for j, experts in enumerate(held):
        ranked = sorted(experts, key=lambda e: (-needed[j, e], e))
        order += [(-round(float(needed[j, e]), ALIKE), rank, j, e) for rank, e in enumerate(ranked)]
    stays: list[set[int]] = [set() for _ in held]
    for *_, j, e in sorted(order)[:room]:
        stays[j].add(e)
    return stays

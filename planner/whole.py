"""``coherent`` plans: timed as a whole, since a layer's time depends on the layer before."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..spec.plan import LayerPlan
from . import memory
from .options import Options
from .step import Step


class Whole(NamedTuple):
    """A plan of every mixture-of-experts layer, its step's seconds, and [G] bytes that it lacks."""

    plans: list[LayerPlan]
    seconds: float
    missing: np.ndarray


def coherent_plans(
    steps: Iterable[tuple[str, Step]], options: Options, stored: int, limits: list[int]
) -> Iterator[tuple[str, Step, Whole]]:
    """In each named layout without tensor groups, one for each placement that ``options`` has; the first ``stored``
    layers have storage."""
    for layout, step in steps:
        if step.layout.tensor > 1:
            continue
        available = _available(step, _plain(options), stored, limits) // len(options.classes.members)
        for layers in options.coherent(np.tile(available, (len(options.classes.members), 1))).values():
            plans = options.classes.spread(layers)
            yield layout, step, Whole(plans, step.seconds(plans), missing(step, plans, stored, limits))


def fits(step: Step, options: Options, stored: int, limits: list[int]) -> bool:
    """Whether the even plan keeps to memory."""
    return not missing(step, _plain(options), stored, limits).any()


def missing(step: Step, plans: Sequence[LayerPlan], stored: int, limits: Sequence[int]) -> np.ndarray:
    """[G] bytes that a plan lacks on each device."""
    return np.array([max(0, held.total - held.limit) for held in step.memory(plans, stored, limits)])


def _plain(options: Options) -> list[LayerPlan]:
    """Experts by number."""
    even_plan = options.plain("ep", options.costs.devices).model_copy(update={"strategy": "coherent"})
    return [even_plan] * len(options.model.moe_layers)


def _available(step: Step, plain: list[LayerPlan], stored: int, limits: list[int]) -> np.ndarray:
    """[G] bytes left for experts, with the activations of the even plan."""
    model, element = step.model, step.costs.element_bytes
    held = step.memory(plain, stored, limits)
    fixed = memory.replicated_weights(model.layers[:stored], model.vocab_size, model.tie_embeddings, 1, element)
    return np.array([m.limit - m.cache - m.activations - fixed for m in held])

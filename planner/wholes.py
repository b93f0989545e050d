"""All plans that are timed as a whole, with their names: ``coherent`` and ``offload`` in every layer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from ..spec.plan import Strategy
from .budget import Budget
from .offloading import Offloading
from .options import Options
from .step import Step
from .whole import Whole, coherent_plans

WHOLE: tuple[Strategy, ...] = ("coherent", "offload")


class Named(NamedTuple):
    """bound: seconds below which no plan of its kind is that was looked at so far."""

    name: str
    step: Step
    whole: Whole
    bound: float


def whole_plans(
    strategies: Sequence[Strategy],
    steps: Callable[[], Iterable[tuple[str, Step]]],
    options: Options,
    stored: int,
    limits: list[int],
    budget: Budget,
) -> Iterator[Named]:
    """In every layout; the first ``stored`` layers have storage, which for ``offload`` are all."""
    expert = f"expert {options.costs.devices}"
    if "coherent" in strategies:
        for layout, step, whole in coherent_plans(steps(), options, stored, limits):
            yield Named(f"all coherent ({layout}, {expert})", step, whole, whole.seconds)
    if "offload" in strategies:
        offloading = Offloading(options, limits, budget)
        for layout, found in offloading.plans(steps()):
            yield Named(f"all offload ({layout}, {expert})", found.step, found.whole, offloading.bound)

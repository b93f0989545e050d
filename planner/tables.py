"""Seconds and bytes of every option of every class of layers, as `solvers.selection` takes them."""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from ..solvers.result import Infeasible, NotFound, Solution
from ..solvers.selection.select import select
from ..spec.plan import LayerPlan, Strategy
from . import memory
from .options import Classes
from .step import Step

FIT_SECONDS = 5.0  # for the question whether anything fits


class Tables:
    """Options of one space: ``options[c]`` are the plans that class c may have.

    seconds: [classes, options] sum over the class's layers, each simulated by itself; inf beyond a class's options.
    arrival: the same of ``Step.slowest_arrival``, which adds up to a lower bound.
    room: [devices] bytes left for what depends on the options: experts, and two regions that layers share (the gathered
    weights and the activations); negative where not even the rest fits.
    """

    def __init__(self, step: Step, classes: Classes, options: Sequence[Sequence[LayerPlan]], room: np.ndarray) -> None:
        self.options, self.room, self._step = options, room, step
        self._layers = [[step.model.moe_layers[ordinal] for ordinal in members] for members in classes.members]
        self.shape = len(options), max(map(len, options))
        model, element, devices = step.model, step.costs.element_bytes, step.layout.devices
        self.weights = np.zeros((*self.shape, devices), np.int64)
        self.regions = np.zeros((*self.shape, 2, devices), np.int64)
        outside = memory.outside_activations(model.layers, model.vocab_size, step.layout, element)
        for c, layers in enumerate(self._layers):
            block = model.layers[layers[0]]
            for o, plan in enumerate(options[c]):
                self.weights[c, o] = memory.expert_weights(block, plan, element)
                self.regions[c, o, 0] = memory.gathered_region(block, plan, element)
                alive = [memory.layer_activations(step.layers[i], plan) for i in layers]
                self.regions[c, o, 1] = np.max([outside, *alive], axis=0)

    @cached_property
    def seconds(self) -> np.ndarray:
        return self._sum(lambda i, plan: self._step.alone(i, plan).seconds)

    @cached_property
    def arrival(self) -> np.ndarray:
        return self._sum(self._step.slowest_arrival)

    def _sum(self, value: Callable[[int, LayerPlan], float]) -> np.ndarray:
        total = np.full(self.shape, np.inf)
        for c, layers in enumerate(self._layers):
            for o, plan in enumerate(self.options[c]):
                total[c, o] = sum(value(i, plan) for i in layers)
        return total

    def fits(self, strategy: Strategy | None, time_limit: float) -> bool:
        """Whether any choice (of this strategy) keeps to memory, as far as can be told in so many seconds."""
        try:
            self.select(np.zeros(self.shape), strategy, min(FIT_SECONDS, time_limit), 0)
        except (Infeasible, NotFound):
            return False
        return True

    def select(
        self, cost: np.ndarray, strategy: Strategy | None, time_limit: float, seed: int
    ) -> Solution[tuple[int, ...]]:
        """The least sum of ``cost`` under memory; of one strategy, or of all. Raises the solver's errors."""
        cost = cost.copy()
        for c, plans in enumerate(self.options):
            allowed = [strategy in (None, plan.strategy) for plan in plans]
            cost[c, [*np.flatnonzero(~np.array(allowed)), *range(len(plans), cost.shape[1])]] = np.inf
        return select(
            cost, self.weights, np.maximum(self.room, 0), shared=self.regions, time_limit=time_limit, seed=seed
        )

    def plans(self, solution: Solution[tuple[int, ...]]) -> list[LayerPlan]:
        """The chosen plan of every class."""
        return [self.options[c][o] for c, o in enumerate(solution.assignment)]

    def missing(self, error: Infeasible) -> np.ndarray:
        """[devices] bytes that are missing at least."""
        deficit = np.maximum(-self.room, 0)
        if error.per_device:
            return deficit + np.array(error.per_device)
        return deficit + np.ceil(error.missing / len(deficit)).astype(int)

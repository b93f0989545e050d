"""Seconds and bytes of every option of every class of layers, as `solvers.selection` takes them."""

# C classes, O options, G devices

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from ..solvers.result import Infeasible, NotFound, Solution
from ..solvers.selection.select import select
from ..spec.plan import LayerPlan, Strategy
from .columns import Column
from .options import Classes
from .step import Step

FIT_SECONDS = 5.0  # for the question whether anything fits


class Tables:
    """Options of one space: one column of plans each, for all classes.

    seconds: [C, O] sum over the class's layers, each by itself; arrival: the same of ``Chains.slowest``, which adds up
    to a lower bound.
    available: [G] bytes left for what depends on the options: experts, and two regions that layers share (the gathered
    weights and the activations); negative where not even the rest fits.
    """

    def __init__(self, step: Step, classes: Classes, columns: Sequence[Column], available: np.ndarray) -> None:
        self.columns, self.available, self.step, self._classes = columns, available, step, classes

    @cached_property
    def seconds(self) -> np.ndarray:
        return self._sum(lambda column: column.seconds)

    @cached_property
    def arrival(self) -> np.ndarray:
        return self._sum(lambda column: column.arrival)

    def _sum(self, value: Callable[[Column], np.ndarray]) -> np.ndarray:
        """[C, O] over the layers of each class."""
        of_class, count = self._classes.of_ordinal, len(self._classes.members)
        return np.stack([np.bincount(of_class, value(column), count) for column in self.columns], axis=1)

    @cached_property
    def _memory(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights [C, O, D] and regions [C, O, 2, D] of devices that differ."""
        first = self._kinds[0]
        weights = np.stack([column.weights[:, first] for column in self.columns], axis=1)
        return weights, np.stack([column.regions[..., first] for column in self.columns], axis=1)

    @cached_property
    def _kinds(self) -> tuple[np.ndarray, np.ndarray]:
        """[D] a device of each kind, and [G] the kind of each: devices of one kind have the same bytes everywhere."""
        rows = [self.available[None]]
        for column in self.columns:
            rows += [column.weights, column.regions.reshape(-1, len(self.available))]
        kinds: dict[bytes, int] = {}
        own = np.ascontiguousarray(np.concatenate(rows).T)
        kind = np.array([kinds.setdefault(row.tobytes(), len(kinds)) for row in own])
        return np.unique(kind, return_index=True)[1], kind

    def fits(self, strategy: Strategy | None, time_limit: float) -> bool:
        """Whether any choice (of this strategy) keeps to memory, as far as can be told in so many seconds."""
        if all(strategy not in (None, column.strategy) for column in self.columns):
            return False
        try:
            self.select(np.zeros(self.seconds.shape), strategy, min(FIT_SECONDS, time_limit), 0)
        except (Infeasible, NotFound):
            return False
        return True

    def select(
        self,
        cost: np.ndarray,
        strategy: Strategy | None,
        time_limit: float,
        seed: int,
        gap: float = 0.0,
        target: float = np.inf,
    ) -> Solution[tuple[int, ...]]:
        """The least sum of ``cost`` under memory; of one strategy, or of all. Raises the solver's errors."""
        weights, regions = self._memory
        allowed = [o for o, column in enumerate(self.columns) if strategy in (None, column.strategy)]
        solution = select(
            cost[:, allowed],
            weights[:, allowed],
            self.available[self._kinds[0]],
            shared=regions[:, allowed],
            gap=gap,
            target=target,
            time_limit=time_limit,
            seed=seed,
        )
        chosen = tuple(allowed[o] for o in solution.assignment)
        return Solution(chosen, solution.objective, solution.bound, solution.status, solution.seconds)

    def fit(self, chosen: Sequence[int]) -> bool:
        """Whether a choice keeps to memory."""
        columns = [self.columns[o] for o in chosen]
        own = np.sum([column.weights[c] for c, column in enumerate(columns)], axis=0)
        shared = np.max([column.regions[c] for c, column in enumerate(columns)], axis=0).sum(axis=0)
        return bool((own + shared <= self.available).all())

    def plans(self, chosen: Sequence[int]) -> list[LayerPlan]:
        """The chosen plan of every class."""
        return [self.columns[o].plans[c] for c, o in enumerate(chosen)]

    def step_seconds(self, chosen: Sequence[int]) -> float:
        """Predicted step time of a choice."""
        step, of_class = self.step, self._classes.of_ordinal
        now = step.outside("embed")[None]
        ordinals = iter(range(len(of_class)))
        for i, block in enumerate(step.blocks):
            if block.moe:
                j = next(ordinals)
                now = self.columns[chosen[of_class[j]]].after(step, j, now)
            else:
                now = step.dense(i).after(step.costs, now)
        return float((now + step.outside("head")).max())

    def lower_bound(self) -> float:
        """No choice of options is predicted faster than this.

        Device by device, the earliest end of each layer: the longest chain over the best option for that device. Every
        operation takes at least its time alone, so induction over the layers gives a bound on every device's end.
        """
        step = self.step
        end = step.outside("embed")[None]
        ordinals = iter(range(len(self._classes.of_ordinal)))
        for i, block in enumerate(step.blocks):
            if block.moe:
                j = next(ordinals)
                end = np.min([column.chains(j).ends(end) for column in self.columns], axis=0)
            else:
                end = step.dense(i).chains.ends(end)
        return float((end + step.outside("head")).max())

    def missing(self, error: Infeasible) -> np.ndarray:
        """[G] bytes that are missing at least."""
        if error.per_device:
            return np.array(error.per_device)[self._kinds[1]]
        return np.full(len(self.available), -(-error.missing // len(self.available)))


def beside(step: Step) -> float:
    """The part of the additive bound that no choice changes.

    Least seconds from the last device's beginning of a layer to the last end, whichever device is last: summed over
    the layers, with the slowest embedding and the fastest head, a lower bound that is additive.
    """
    dense = sum(float(step.dense(i).chains.slowest()[0]) for i, block in enumerate(step.blocks) if not block.moe)
    return float(step.outside("embed").max() + step.outside("head").min()) + dense

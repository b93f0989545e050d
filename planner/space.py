"""The searched space: layouts x expert degrees x one option for every mixture-of-experts layer."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import Any, NamedTuple

import numpy as np

from ..solvers.result import Infeasible, NotFound
from ..spec.layout import even
from ..spec.model import Model
from ..spec.plan import STRATEGIES, Candidate, Degrees, LayerPlan, Strategy
from ..spec.routing import Routing
from ..spec.workload import Workload
from . import memory
from .costs import Costs
from .few import Open
from .given import Given
from .layout import Layout
from .options import Classes, Options
from .splits import layouts
from .step import Step
from .tables import Tables
from .units import bytes_text

ROUNDING = 1e-9  # relative
LEAST_TIME, SELECT_TIME = 0.1, 0.5  # seconds of one selection, and of what is left at most
BASELINES = {"linear ep": "linear", "greedy ep": "greedy"}  # what a user would do by hand: even tokens, this placement


class Choice(NamedTuple):
    """One simulated alternative; no plans where nothing fits."""

    candidate: Candidate
    step: Step
    plans: list[LayerPlan]


@dataclass
class Search:
    """One search, with storage for ``stored`` layers; ``limits`` are bytes per device.

    bound: lower bound on the step seconds of everything in the spaces searched so far.
    missing: per space in which nothing fits, the bytes missing on each device.
    """

    costs: Costs
    model: Model
    workload: Workload
    routing: Routing
    limits: list[int]
    strategies: tuple[Strategy, ...]
    stored: int
    even: bool
    seed: int
    deadline: float
    on_event: Callable[[dict[str, Any]], None] | None = None
    given: Given | None = None  # a user's own placement: ``ep`` with nothing else
    choices: list[Choice] = field(default_factory=list)
    missing: list[np.ndarray] = field(default_factory=list)
    bound: float = inf
    open: list[Open] = field(default_factory=list)  # spaces of few plans whose bound is not taken in yet
    searched: int = 0  # spaces
    spaces: int = 0
    interrupted: bool = False
    cut: bool = False  # by the clock, inside a space

    @cached_property
    def classes(self) -> Classes:
        return Classes.of(self.model.moe_layers, self.stored)

    @cached_property
    def options(self) -> Options:
        given = None if self.given is None else self.given.layers
        return Options(self.costs, self.model, self.routing, self.classes, self.even, self.seed, self.deadline, given)

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        whole_layers = "gathered" in self.strategies
        return layouts(self.costs, self.model, self.workload, self.routing, whole_layers, only_even=self.even)

    @cached_property
    def degrees(self) -> list[int]:
        """Expert degrees; only ``ep`` knows any but all devices, for which a placement is given."""
        devices = self.costs.devices
        if self.given is not None:
            return [devices]
        return [d for d in range(devices, 0, -1) if devices % d == 0] if "ep" in self.strategies else [devices]

    def run(self) -> None:
        """Search every space, or as many as the time (or Ctrl-C) allows; the first always."""
        self.spaces = len(self.layouts) * len(self.degrees)
        try:
            for name, layout in self.layouts.items():
                step = Step(self.costs, self.model, layout, self.routing)
                for degree in self.degrees:
                    if self.searched and time.perf_counter() > self.deadline:
                        continue
                    if self.on_event:
                        self.on_event({"done": self.searched, "of": self.spaces, "what": f"{name}, expert {degree}"})
                    self._space(name, step, degree)
                    self.searched += 1
        except KeyboardInterrupt:
            if not self.searched:
                raise
            self.interrupted = True
        try:
            self._settle()
        except KeyboardInterrupt:
            self.interrupted = True
            self.bound = min(self.bound, *(left.bound for left in self.open))
        self._baselines()

    def fits(self, strategy: Strategy | None) -> bool:
        """Whether any plan (of this strategy) keeps to memory, in any layout."""
        for layout in self.layouts.values():
            step = Step(self.costs, self.model, layout, self.routing)
            if any(self._tables(step, degree, thorough=False).fits(strategy, self._left()) for degree in self.degrees):
                return True
        return False

    def _tables(self, step: Step, degree: int, thorough: bool = True) -> Tables:
        """The options of one layout and expert degree."""
        found: list[list[LayerPlan]] = [[] for _ in self.classes.members]
        for strategy in self.strategies:
            share = self._share(step, strategy, degree)
            if strategy == "ep":
                for plans in self.options.ep(degree, share, thorough).values():
                    _extend(found, [[plan] for plan in plans])
            else:
                _extend(found, self.options.sharded(share) if strategy == "sharded" else self.options.gathered(share))
        return Tables(step, self.classes, found, self._room(step))

    def _space(self, layout: str, step: Step, degree: int) -> None:
        """Candidates and bound of one layout and expert degree."""
        tables = self._tables(step, degree)
        where = f"{layout}, expert {degree}"
        for strategy in self.strategies:
            if self.choices and any(c.plans for c in self.choices) and time.perf_counter() > self.deadline:
                self.cut = True
                break
            if strategy == "ep" or degree == self.costs.devices:  # the others are the same for every expert degree
                self._choose(f"all {strategy} ({where})", step, degree, tables, strategy)
        if len(self.strategies) > 1 and not self.cut:
            self._choose(f"mixed ({where})", step, degree, tables, None)
        bound = self._lower_bound(step, tables)
        left = Open(where, step, degree, tables.options, bound)
        if bound < self._best * (1 - ROUNDING) and left.few:
            self.open.append(left)
        else:
            self.bound = min(self.bound, bound)

    def _settle(self) -> None:
        """Look at every plan of the open spaces, the most promising first, as far as they may hold the fastest."""
        for left in sorted(self.open, key=lambda space: space.bound):
            bound = left.bound
            if bound < self._best * (1 - ROUNDING) and not self.interrupted:
                found = left.fastest(self.classes, self.stored, self.limits, self.deadline)
                if found is not None and found[0]:
                    plans, bound = found
                    used = {plan.strategy for plan in plans}
                    kind = f"all {used.pop()}" if len(used) == 1 else "mixed"
                    self._record(f"{kind} ({left.where})", left.step, left.degree, plans, "")
            self.bound = min(self.bound, bound)

    @property
    def _best(self) -> float:
        """Seconds of the fastest so far."""
        return min(
            (c.candidate.step_seconds for c in self.choices if c.candidate.step_seconds is not None), default=inf
        )

    def _choose(self, name: str, step: Step, degree: int, tables: Tables, strategy: Strategy | None) -> None:
        """The exact choice among the options (of one strategy, or of all), simulated whole; few: where all plans are.

        Copies of experts are chosen only where the whole step is no slower with them.
        """
        try:
            solution = tables.select(tables.seconds, strategy, self._left(), self.seed)
        except Infeasible as error:
            self.missing.append(tables.missing(error))
            self._record(name, step, degree, [], lacking(self.missing[-1]))
        except NotFound:
            self._record(name, step, degree, [], "nothing that fits was found in the time allowed")
        else:
            plans = self.classes.spread(tables.plans(solution))
            if degree == self.costs.devices and any(map(self._copied, plans)):
                plans = self._with_or_without_copies(step, tables, strategy, plans)
            self._record(name, step, degree, plans, "")

    def _copied(self, plan: LayerPlan) -> bool:
        return sum(map(len, plan.slots)) > self.options.moe.num_experts

    def _with_or_without_copies(
        self, step: Step, tables: Tables, strategy: Strategy | None, plans: list[LayerPlan]
    ) -> list[LayerPlan]:
        """The faster, simulated whole, of ``plans`` and of the choice among options of single copies."""
        cost = tables.seconds.copy()
        for c, options in enumerate(tables.options):
            cost[c, [o for o, plan in enumerate(options) if self._copied(plan)]] = np.inf
        try:
            single = tables.select(cost, strategy, self._left(), self.seed)
        except (Infeasible, NotFound):
            return plans
        return min(plans, self.classes.spread(tables.plans(single)), key=step.seconds)

    def _lower_bound(self, step: Step, tables: Tables) -> float:
        """What is proven for this space; infinite where nothing fits."""
        try:
            additive = tables.select(tables.arrival, None, self._left(), self.seed).bound
        except Infeasible:
            return inf
        except NotFound:
            additive = 0.0
        of_class = {ordinal: c for c, members in enumerate(self.classes.members) for ordinal in members}
        chains = step.lower_bound([tables.options[of_class[ordinal]] for ordinal in range(len(of_class))])
        dense = sum(step.slowest_arrival(i, None) for i, block in enumerate(self.model.layers) if not block.moe)
        return max(chains, additive + dense + step.outside_bounds())

    def _baselines(self) -> None:
        """They count as candidates only where ``ep`` is searched, which has them among its options (``searched``)."""
        devices = self.costs.devices
        layout = Layout.of(self.workload, 1, even(self.workload.sequences, devices))
        step = Step(self.costs, self.model, layout, self.routing)
        placements = self.options.usual(devices, self._share(step, "ep", devices))
        for name, method in BASELINES.items():
            plans = self.classes.spread(placements.get(method, placements["linear"]))
            held = step.memory(plans, self.stored, self.limits)
            missing = np.array([max(0, m.total - m.limit) for m in held])
            self._record(name, step, devices, plans, lacking(missing) if missing.any() else "")

    def _record(self, name: str, step: Step, degree: int, plans: list[LayerPlan], reason: str) -> None:
        used = [plan.strategy for plan in plans]
        candidate = Candidate(
            name=name,
            degrees=Degrees(tensor=step.layout.tensor, data=step.layout.devices // step.layout.tensor, expert=degree),
            strategies={strategy: used.count(strategy) for strategy in STRATEGIES if strategy in used},
            tokens=step.layout.tokens,
            step_seconds=None if reason else step.seconds(plans),
            reason=reason,
        )
        self.choices.append(Choice(candidate, step, plans))

    def _room(self, step: Step) -> np.ndarray:
        """[devices] bytes left for what depends on the options."""
        model, element = self.model, self.costs.element_bytes
        stored = model.layers[: self.stored]
        fixed = memory.replicated_weights(stored, model.vocab_size, model.tie_embeddings, step.layout.tensor, element)
        return np.array(self.limits) - fixed - memory.cache(model.layers, step.layout, element)

    def _share(self, step: Step, strategy: Strategy, degree: int) -> np.ndarray:
        """[classes, devices] bytes of experts that each class may take if all take the same.

        It guides uneven placements and splits; activations are those of the even plan. What a choice really takes is
        checked by the selection.
        """
        plan, layers = self.options.plain(strategy, degree), [step.layers[i] for i in self.model.moe_layers]
        region = memory.gathered_region(layers[0].block, plan, self.costs.element_bytes)
        activations = np.max([memory.layer_activations(layer, plan) for layer in layers], axis=0)
        classes = len(self.classes.members)
        return np.tile((self._room(step) - region - activations) // classes, (classes, 1))

    def _left(self) -> float:
        """Seconds that one selection under memory may take."""
        return max(LEAST_TIME, SELECT_TIME * (self.deadline - time.perf_counter()))


def _extend(options: list[list[LayerPlan]], more: list[list[LayerPlan]]) -> None:
    """Add the plans that a class does not have yet."""
    for mine, plans in zip(options, more, strict=True):
        mine += [plan for plan in plans if plan not in mine]


def lacking(missing: np.ndarray) -> str:
    """Which devices lack how much."""
    parts = [f"device {d} lacks {bytes_text(int(m))}" for d, m in enumerate(missing) if m > 0]
    return f"does not fit: {', '.join(parts)}"

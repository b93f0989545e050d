"""The searched space: layouts x expert degrees x one option for every mixture-of-experts layer."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter

import numpy as np

from ..solvers.result import Infeasible, NotFound
from ..spec.layout import even
from ..spec.model import Model
from ..spec.plan import STRATEGIES, LayerPlan, Strategy
from ..spec.routing import Routing
from ..spec.trace import Trace
from ..spec.workload import Workload
from . import memory
from .alternatives import Choice, keep
from .budget import Budget
from .choices import REMEMBERED, Choices
from .chunking import fastest_alone, promising
from .columns import Column
from .costs import Costs
from .expected import Expected
from .few import Open
from .floors import placed_floor
from .given import Given
from .layout import Layout
from .offered import PLACED
from .options import Classes, Options
from .splits import layouts
from .step import Step
from .tables import Tables, beside
from .units import lacking
from .whole import fits as coherent_fits
from .wholes import WHOLE, whole_plans

ROUNDING = 1e-9  # relative
LEAST_TIME, SELECT_TIME = 0.1, 0.5  # seconds of one selection, and of what is left at most
MOST_TIME = 1e6  # seconds of one where there is no limit: solvers want a number
CHOICE_GAP = 1e-3  # of a selection, relative, that no program is solved for
WORTH = 0.02  # of the step that a search for placements, or a program, must be able to gain
REFINED, NEAR = 2, 1.1  # spaces in which placements are searched for; times the fastest that ep, or its kin, may take
BASELINES = {"linear ep": "linear", "greedy ep": "greedy"}  # what a user would do by hand: even tokens, this placement


@dataclass
class Search:
    """One search, with storage for ``stored`` layers; ``limits`` are bytes per device.

    ``dataclasses.replace`` makes another one, which has found nothing yet. Ctrl-C sets ``budget.stop``.

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
    budget: Budget
    given: Given | None = None  # a user's own placement, with nothing else
    whole: tuple[Strategy, ...] = ()  # of ``WHOLE``, looked at beside what ``strategies`` layers choose from
    trace: Trace | None = None  # that the routing was drawn from
    by_batch: bool = False  # whether shares of copies are decided for every batch
    choices: list[Choice] = field(init=False, default_factory=list)
    missing: list[np.ndarray] = field(init=False, default_factory=list)
    bound: float = field(init=False, default=math.inf)
    # Spaces of few plans whose bound is not taken in yet:
    open: dict[str, Open] = field(init=False, default_factory=dict)
    searched: int = field(init=False, default=0)  # spaces
    spaces: int = field(init=False, default=0)
    cut: bool = field(init=False, default=False)  # by the clock, inside a space
    chunked: set[Strategy] = field(init=False, default_factory=set)  # whose tokens were looked at in chunks
    _columns: dict[tuple, Column] = field(init=False, default_factory=dict)  # of the layout that is searched
    _tabled: dict[tuple[int, bool], Tables] = field(init=False, default_factory=dict)
    _of: Step | None = field(init=False, default=None)
    _known_available: np.ndarray | None = field(init=False, default=None)
    _equal: dict[LayerPlan, LayerPlan] = field(init=False, default_factory=dict)
    _tokens: tuple[int, ...] = field(init=False, default=())  # of the layouts that share ``_counted``
    _counted: dict[tuple[int, ...], Choices | Expected] = field(init=False, default_factory=dict)
    # Seconds of placed experts, floor, space:
    _promising: list[tuple[float, float, str, int]] = field(init=False, default_factory=list)

    @cached_property
    def classes(self) -> Classes:
        return Classes.of(self.model.moe_layers, self.stored)

    @cached_property
    def options(self) -> Options:
        given = None if self.given is None else self.given.layers
        usual = self.costs, self.model, self.routing, self.classes, self.even, self.seed, self.budget
        return Options(*usual, given, self.trace, self.by_batch)

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        routing = self.routing if "gathered" in self.strategies else None
        return layouts(self.costs, self.model, self.workload, routing, only_even=self.even)

    @cached_property
    def degrees(self) -> list[int]:
        """Expert degrees; only placed experts know any but all devices, for which a placement is given."""
        devices, least = self.costs.devices, 1 if self.given is None and self.placed else self.costs.devices
        known = (d for d in range(devices, least - 1, -1) if devices % d == 0)
        return [d for d in known if d == devices or any(self.options.has(s, d) for s in self.placed)]

    @cached_property
    def placed(self) -> tuple[Strategy, ...]:
        """Those of the strategies whose experts are placed."""
        return tuple(strategy for strategy in self.strategies if strategy in PLACED)

    def run(self) -> None:
        """Search every space, or as many as the time (or Ctrl-C) allows; the first always."""
        self.spaces = len(self.layouts) * len(self.degrees) if self.strategies else 0
        try:
            for name, step in self._steps() if self.strategies else ():
                # The most promising first, so that others need not be searched.
                for floor, degree in sorted(((self._floor(step, d), d) for d in self.degrees), key=itemgetter(0)):
                    if self.searched and self.budget.over:
                        continue
                    what, known = f"{name}, expert {degree}", self._fastest
                    self.budget.tell(done=self.searched, of=self.spaces, what=what, incumbent=known)
                    self._space(name, step, degree, floor)
                    self.searched += 1
        except KeyboardInterrupt:
            if not self.searched:
                raise
            self.budget.stop.set()
        else:
            self._finish()
        self.bound = min(self.bound, *(left.bound for left in self.open.values()), math.inf)
        self._baselines()

    def _finish(self) -> None:
        """What comes after all spaces; Ctrl-C ends it."""
        try:
            self._refine()
            self._in_chunks()
            self._settle()
            self._look_at_whole()
        except KeyboardInterrupt:
            if not any(choice.plans for choice in self.choices):
                raise
            self.budget.stop.set()

    def fits(self, strategy: Strategy | None) -> bool:
        """Whether any plan (of this strategy) keeps to memory, in any layout."""
        by_layer = strategy not in WHOLE and self.strategies
        coherent = strategy in (None, "coherent") and "coherent" in self.whole
        for _, step in self._steps():
            if by_layer and any(self._tables(step, degree).fits(strategy, self._left()) for degree in self.degrees):
                return True
            if coherent and step.layout.tensor == 1 and coherent_fits(step, self.options, self.stored, self.limits):
                return True
        return False

    def _steps(self) -> Iterator[tuple[str, Step]]:
        """Every layout's step; what is known of one is kept while it is the last that was looked at."""
        for name, layout in self.layouts.items():
            if self._of is None or self._of.layout is not layout:
                if self._tokens != layout.tokens:
                    self._tokens, self._counted = layout.tokens, {}
                self._of = Step(self.costs, self.model, layout, self.routing, counted=self._counted)
                self._columns.clear()
                self._known_available = None
                self._tabled.clear()
            yield name, self._of

    def _tables(self, step: Step, degree: int, thorough: bool = False) -> Tables:
        """The options of one layout and expert degree."""
        if (degree, thorough) not in self._tabled:
            columns: list[Column] = []
            for strategy in self.placed:
                if self.options.has(strategy, degree):
                    share = self._share(step, self.placed[0], degree)
                    found = self.options.placed(strategy, degree, share, thorough).values()
                    columns += [self._column(step, plans) for plans in dict.fromkeys(map(tuple, found))]
            columns += self._others(step, degree)
            self._tabled[degree, thorough] = Tables(step, self.classes, columns, self._available(step))
        return self._tabled[degree, thorough]

    def _others(self, step: Step, degree: int) -> list[Column]:
        """The options of the strategies whose experts are not placed."""
        found: list[tuple[LayerPlan, ...]] = []
        for strategy in self.strategies:
            if strategy not in self.placed:
                share = self._share(step, strategy, degree)
                options = self.options.sharded(share) if strategy == "sharded" else self.options.gathered(share)
                # Classes with fewer options than others repeat their last.
                most = max(map(len, options))
                found += [tuple(plans[min(o, len(plans) - 1)] for plans in options) for o in range(most)]
        return [self._column(step, plans) for plans in dict.fromkeys(found)]

    def _column(self, step: Step, plans: tuple[LayerPlan, ...]) -> Column:
        if step is not self._of:
            return Column.of(step, self.classes, plans)
        if self.costs.devices <= REMEMBERED:  # equal plans are one, so that their rows are counted once
            plans = tuple(self._equal.setdefault(plan, plan) for plan in plans)
        if plans not in self._columns:
            self._columns[plans] = Column.of(step, self.classes, plans)
        return self._columns[plans]

    def _space(self, layout: str, step: Step, degree: int, floor: float) -> None:
        """Candidates and bound of one layout and expert degree; only the bound where that says enough."""
        if floor >= self._fastest:
            self.bound = min(self.bound, floor)
            return
        where = f"{layout}, expert {degree}"
        self._look(where, step, degree, self._tables(step, degree, thorough=self.options.small))
        if self.placed and degree > 1 and not self.options.small:
            own = (c.seconds for c in self.choices if c.candidate.name in [f"all {s} ({where})" for s in self.placed])
            self._promising.append((min(own, default=math.inf), floor, layout, degree))

    def _refine(self) -> None:
        """Search for placements in the few spaces where placed experts are fastest and may gain ``WORTH`` in all."""
        for seconds, floor, layout, degree in sorted(self._promising)[:REFINED]:
            if self.cut or self.budget.over or floor >= (1 - WORTH) * self._fastest or seconds > NEAR * self._fastest:
                continue
            step = next(step for name, step in self._steps() if name == layout)
            usual, thorough = self._tables(step, degree), self._tables(step, degree, thorough=True)
            if len(thorough.columns) > len(usual.columns):
                self._look(f"{layout}, expert {degree}", step, degree, thorough, self.placed)

    def _in_chunks(self) -> None:
        """Look at the fastest plans of one strategy once more, with tokens that travel in chunks."""
        if self.even:
            return
        for (layout, degree), alone in fastest_alone(self.choices, self.classes, REFINED).items():
            if self.cut or self.budget.over:
                return
            where, step = next((name, step) for name, step in self._steps() if step.layout == layout)
            tried = {plans: promising(step, self.classes, plans, self.budget) for plans in alone}
            self.chunked |= {plans[0].strategy for plans, found in tried.items() if found is not None}
            if cut := [way for found in tried.values() for way in found or ()]:
                usual = self._tables(step, degree)
                columns = [*usual.columns, *(self._column(step, plans) for plans in cut)]
                tables = Tables(step, self.classes, columns, self._available(step))
                self._look(f"{where}, expert {degree}", step, degree, tables, [way[0].strategy for way in cut])

    def _look(self, where: str, step: Step, degree: int, tables: Tables, anew: Sequence[Strategy] = STRATEGIES) -> None:
        """Candidates and bound among these options; anew: strategies that have more of them than before."""
        for strategy in self.strategies:
            if self.choices and any(c.plans for c in self.choices) and self.budget.over:
                self.cut = True
                break
            # Strategies without placement are the same for every expert degree.
            known = self.options.has(strategy, degree) if strategy in self.placed else degree == self.costs.devices
            if known and strategy in anew:
                self._choose(f"all {strategy} ({where})", step, degree, tables, strategy)
        if len(self.strategies) > 1 and not self.cut:
            self._choose(f"mixed ({where})", step, degree, tables, None)
        bound = self._lower_bound(tables)
        left = Open(where, degree, tables, bound)
        self.open.pop(where, None)  # more options have a lower bound
        if bound < self._fastest * (1 - ROUNDING) and left.few:
            self.open[where] = left
        else:
            self.bound = min(self.bound, bound)

    def _settle(self) -> None:
        """Look at every plan of the open spaces, the most promising first, as far as they may hold the fastest."""
        for left in sorted(self.open.values(), key=lambda space: space.bound):
            bound = left.bound
            if bound < self._fastest * (1 - ROUNDING):
                found = left.fastest(self.budget)
                if found is not None and found[0]:
                    chosen, bound = found
                    plans = self.classes.spread(left.tables.plans(chosen))
                    used = {plan.strategy for plan in plans}
                    kind = f"all {used.pop()}" if len(used) == 1 else "mixed"
                    self._record(f"{kind} ({left.where})", left.tables.step, left.degree, plans, bound, "")
            del self.open[left.where]
            self.bound = min(self.bound, bound)

    def _look_at_whole(self) -> None:
        """Every plan that is timed as a whole; of each name the fastest is kept."""
        looked = self.whole, self._steps, self.options, self.stored, self.limits, self.budget
        for name, step, whole, bound in whole_plans(*looked):
            reason = lacking(whole.missing) if whole.missing.any() else ""
            plans, seconds = ([], math.inf) if reason else (whole.plans, whole.seconds)
            self._record(name, step, self.costs.devices, plans, seconds, reason)
            self.missing += [whole.missing] if reason else []
            self.bound = min(self.bound, math.inf if reason else bound)
            if self.budget.over and any(choice.plans for choice in self.choices):
                self.cut = True
                break

    def _floor(self, step: Step, degree: int) -> float:
        """No plan of this space is predicted faster, wherever its experts are and whatever memory there is."""
        if not self.placed:
            return 0.0
        # By expectation only single copies are predicted, but for a placement that is given.
        copies = degree == self.costs.devices and (self.routing.scale == 1 or self.given is not None)
        placed = [strategy for strategy in self.placed if self.options.has(strategy, degree)]
        floors = [placed_floor(step, strategy, degree, copies) for strategy in placed]
        least = np.min([*floors, *(column.arrival for column in self._others(step, degree))], axis=0)
        return float(least.sum()) + beside(step)

    @property
    def _fastest(self) -> float:
        """Seconds of the fastest alternative so far that fits."""
        return min((c.seconds for c in self.choices if not c.candidate.reason), default=math.inf)

    def _choose(self, name: str, step: Step, degree: int, tables: Tables, strategy: Strategy | None) -> None:
        """The exact choice among the options (of one strategy, or of all), timed whole.

        Copies of experts are chosen only where the whole step is no slower with them.
        """
        try:
            target = (1 - WORTH) * self._fastest - beside(step)
            solution = tables.select(tables.seconds, strategy, self._left(), self.seed, CHOICE_GAP, target)
        except Infeasible as error:
            self.missing.append(tables.missing(error))
            self._record(name, step, degree, [], math.inf, lacking(self.missing[-1]))
        except NotFound:
            self._record(name, step, degree, [], math.inf, "nothing that fits was found in the time allowed")
        else:
            chosen, seconds = solution.assignment, tables.step_seconds(solution.assignment)
            if degree == self.costs.devices and any(tables.columns[o].copied[c] for c, o in enumerate(chosen)):
                chosen, seconds = self._with_or_without_copies(tables, strategy, chosen, seconds)
            self._record(name, step, degree, self.classes.spread(tables.plans(chosen)), seconds, "")

    def _with_or_without_copies(
        self, tables: Tables, strategy: Strategy | None, chosen: tuple[int, ...], seconds: float
    ) -> tuple[tuple[int, ...], float]:
        """The faster, timed whole, of a choice and of that among options of single copies; and its seconds."""
        cost = tables.seconds.copy()
        cost[:, [o for o, column in enumerate(tables.columns) if any(column.copied)]] = math.inf
        try:
            single = tables.select(cost, strategy, self._left(), self.seed, CHOICE_GAP).assignment
        except (Infeasible, NotFound):
            return chosen, seconds
        without = tables.step_seconds(single)
        return (single, without) if without < seconds else (chosen, seconds)

    def _lower_bound(self, tables: Tables) -> float:
        """What is proven for this space; infinite where nothing fits."""
        try:
            additive = tables.select(tables.arrival, None, self._left(), self.seed, target=0.0).bound
        except Infeasible:
            return math.inf
        except NotFound:
            additive = 0.0
        additive += beside(tables.step)
        return additive if additive >= self._fastest else max(tables.lower_bound(), additive)

    def _baselines(self) -> None:
        """They count as candidates only where ``ep`` is searched, which has them among its options (``searched``)."""
        devices = self.costs.devices
        layout = Layout.of(self.workload, 1, even(self.workload.sequences, devices))
        if self._of is not None and self._of.layout == layout:
            step = self._of
        else:
            step = Step(self.costs, self.model, layout, self.routing)
        placements = self.options.usual(devices, self._share(step, "ep", devices))
        for name, method in BASELINES.items():
            own = tuple(placements.get(method, placements["linear"]))
            column, available = self._column(step, own), self._available(step)
            seconds = Tables(step, self.classes, [column], available).step_seconds([0] * len(own))
            missing = np.maximum(column.weights.sum(0) + column.regions.max(0).sum(0) - available, 0)
            reason = lacking(missing) if missing.any() else ""
            self._record(name, step, devices, self.classes.spread(own), seconds, reason)

    def _record(self, name: str, step: Step, degree: int, plans: list[LayerPlan], seconds: float, reason: str) -> None:
        keep(self.choices, Choice.of(name, step, degree, plans, seconds, reason))

    def _available(self, step: Step) -> np.ndarray:
        """[devices] bytes left for what depends on the options."""
        if step is not self._of:
            return self._computed_available(step)
        if self._known_available is None:
            self._known_available = self._computed_available(step)
        return self._known_available

    def _computed_available(self, step: Step) -> np.ndarray:
        model, element = self.model, self.costs.element_bytes
        stored = model.layers[: self.stored]
        fixed = memory.replicated_weights(stored, model.vocab_size, model.tie_embeddings, step.layout.tensor, element)
        return np.array(self.limits) - fixed - memory.cache(model.layers, step.layout, element)

    def _share(self, step: Step, strategy: Strategy, degree: int) -> np.ndarray:
        """[classes, devices] bytes of experts that each class may take if all take the same.

        It guides uneven placements and splits; activations are those of the even plan. What a choice really takes is
        checked by the selection.
        """
        classes = len(self.classes.members)
        column = self._column(step, (self.options.plain(strategy, degree),) * classes)
        region, activations = column.regions.max(0)
        return np.tile((self._available(step) - region - activations) // classes, (classes, 1))

    def _left(self) -> float:
        """Seconds that one selection under memory may take."""
        return min(max(LEAST_TIME, SELECT_TIME * self.budget.left), MOST_TIME)

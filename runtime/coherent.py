"""One rank of a coherent plan (ExFlow): decoding steps in which a token lives where its last expert was.

Every device keeps the keys and values of all sequences, so that a token's next attention can be wherever it is. A step
begins with each device's own tokens and ends with them: residual streams travel home, and one gather brings the step's
new keys and values of all layers to every device.

Letters: T tokens that are here, D model, G devices.
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from ..spec import MoeplanError, Plan
from ..spec.routing import Routing
from .attention import Batch, attention
from .collectives import all_gather, all_to_all, exchange_counts
from .dense import dense
from .executor import Executor, Holder, Output, StepLap, no_lap
from .families.source import FamilyWeights
from .layout import Layout
from .reference import forced_choice
from .router import Choice, Chooser, choose, route
from .step_end import pack_cache, pack_home, unpack_home, write_cache
from .strategies.coherent import Coherent
from .timers import OUTSIDE, Timers
from .weights import Range, WeightSource

if TYPE_CHECKING:
    from .families.execute import FamilyExecutor


@overload
def executor_of(plan: Plan, rank: int, source: WeightSource, *, device: torch.device, capacity: int) -> Executor: ...
@overload
def executor_of(
    plan: Plan, rank: int, source: FamilyWeights, *, device: torch.device, capacity: int
) -> "FamilyExecutor": ...
@overload
def executor_of(
    plan: Plan, rank: int, source: WeightSource | FamilyWeights, *, device: torch.device, capacity: int
) -> "Executor | FamilyExecutor": ...
def executor_of(
    plan: Plan, rank: int, source: WeightSource | FamilyWeights, *, device: torch.device, capacity: int
) -> "Executor | FamilyExecutor":
    """What executes ``plan``; arguments and errors as of ``Executor``."""
    if isinstance(source, FamilyWeights):
        from .families.execute import FamilyExecutor  # and Transformers with it

        return FamilyExecutor(plan, rank, source, device=device)
    kind = CoherentExecutor if plan.layers[0].strategy == "coherent" else Executor
    return kind(plan, rank, source, device=device, capacity=capacity)


class CoherentExecutor(Executor):
    """As ``Executor``, for plans whose mixture-of-experts layers are all ``coherent``."""

    def _make_holders(self, plan: Plan, rank: int) -> Mapping[int, Holder]:
        self._coherent = {i: Coherent(layer, context) for i, layer, context in self._contexts(plan, rank)}
        return self._coherent

    def _sequences(self) -> Range:
        return 0, sum(self.layout.sequences)

    def forced(self, routing: Routing, layout: Layout) -> list[Choice]:
        """All tokens of a routing, one entry per mixture-of-experts layer: any may come here."""
        return [forced_choice(routing, j, self.device) for j in range(len(self._coherent))]

    @torch.inference_mode()
    def step(
        self,
        inputs: Tensor,
        layout: Layout,
        context: int,
        *,
        forced: list[Choice] | None = None,
        timers: Timers | None = None,
        layers: int | None = None,
        chooser: Chooser = choose,
    ) -> Output:
        """As ``Executor.step``, for one new token of each sequence; raises MoeplanError for more."""
        if layout.length != 1:
            raise MoeplanError(f"coherent plans decode one new token of each sequence at a time, got {layout.length}")
        lap = timers.lap if timers is not None else no_lap
        x, ordinal = self._begin(inputs, lap), 0
        number = torch.arange(layout.own.start, layout.own.stop, device=self.device)
        written: dict[int, Tensor] = {}  # sequences whose keys and values each layer wrote here
        for i, weights in enumerate(self._layers[:layers]):
            if weights.attention is not None:
                batch, cache = Batch(len(number), 1, context), self.cache.layers[i]
                x = x + attention(x, weights.attention, cache, self._rope, batch, rows=number)
                written[i] = number
                lap(i, "attention")
            if i in self._coherent:
                choice = forced[ordinal] if forced is not None else None
                x, number = self._visit(x, number, i, choice, chooser, partial(lap, i))
                ordinal += 1
            if weights.dense is not None:
                x = x + dense(x, weights.dense)
                lap(i, "dense")
        if len(layout.tokens) > 1:
            x = self._end(x, number, written, layout, context, lap)
        return self._finish(x, layout, lap)

    def _visit(
        self, x: Tensor, number: Tensor, index: int, forced: Choice | None, chooser: Chooser, lap: partial[None]
    ) -> tuple[Tensor, Tensor]:
        """One mixture-of-experts layer: x [T, D] and number [T] of the tokens here before it -> of those after it."""
        moe, weights = self.model.layers[index].moe, self._layers[index]
        assert moe is not None
        assert weights.router is not None
        choice = None if forced is None else (forced[0][number], forced[1][number])
        _, ids, gates = route(x, weights.router, moe, choice, chooser=chooser)
        lap("route")
        x, came = self._coherent[index].forward(x, ids, gates, number, weights.router, lap)
        if weights.shared is not None:
            x = x + dense(came.normed[came.stays], weights.shared)
            lap("shared")
        return x, came.number

    def _end(
        self, x: Tensor, number: Tensor, written: Mapping[int, Tensor], layout: Layout, context: int, lap: StepLap
    ) -> Tensor:
        """Residual streams on their tokens' own devices; keys and values of position ``context`` on all devices."""
        stacks = self.cache.stacks
        places = [stack.places(written) for stack in stacks]
        rows, home = pack_home(x, number, layout.tokens)
        mine = torch.tensor([len(held) for held in places], device=self.device).expand(len(home), -1)
        sent = torch.cat([home[:, None], mine], dim=1)
        came = exchange_counts(sent).t().tolist()  # [1 + stacks, G]
        x = unpack_home(all_to_all(rows, home.tolist(), came[0]), x.dtype, layout.first)
        lap(OUTSIDE, "combine")
        for stack, held, counts in zip(stacks, places, came[1:], strict=True):
            write_cache(stack, all_gather(pack_cache(stack, held, context), counts), context)
        lap(OUTSIDE, "gather")
        return x

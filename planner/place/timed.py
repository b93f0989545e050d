"""Placement for predicted time: searched by measured speeds, memory and links; of what is found the prediction decides.

What is timed is what a placement changes in a step under ``ep``: per layer, dispatch, the slowest device's experts,
combine; attention and all else stay as they are.

Annealing needs costs that add up: a token's pair of experts apart costs what its row takes over the measured link, the
balance of a layer costs the ideal time of its experts. Both are approximations of what contention and curves do, so
placements for several prices of balance are predicted in full, beside EPLB and linear, and the fastest is taken.
"""

# T tokens, L layers, E experts, G devices

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ...solvers.result import Solution
from ...solvers.slots import Slots
from ...spec.cluster import Cluster
from ...spec.errors import InfeasibleError, MissingCurveError, MoeplanError
from ...spec.layout import even
from ...spec.model import DType, Model
from ...spec.operators import expert_shape
from ...spec.placement import PlacementDevice, PlacementLayer
from ...spec.routing import check_shape, traced_routing
from ...spec.trace import WHOLE_SEQUENCES, Trace
from ...spec.workload import Workload
from ..budget import SAFETY_FACTOR, Budget
from ..costs import Costs
from ..layout import Layout
from ..splits import expert_speeds, layouts
from ..strategies.layer import Layer
from ..units import bytes_text
from .fleet import even_fleet, spread_slots
from .layers import document_layers, layer_plan
from .sample import load_samples, windows
from .single import Single
from .weights import exchange_weights

AFFINITY_TIME = 0.3  # of the time, at most, for the traffic between experts
PRICES = (0.3, 1.0, 3.0)  # times the ideal time of a layer's experts
USED_MEMORY = 0.9  # of a device's memory may be weights; the rest is for activations and keys and values


@dataclass(frozen=True, eq=False)
class Timing:
    """Predicts what placements cost on a measured cluster, for steps drawn from a trace."""

    cluster: Cluster
    model: Model
    workload: Workload
    dtype: DType
    seed: int = 0
    asked: str = ""  # what the user typed for the model, which advice names

    @cached_property
    def costs(self) -> Costs:
        return Costs(self.cluster, self.model, self.dtype, self.asked)

    def devices(self, trace: Trace, slots: int, equal_slots: bool) -> tuple[PlacementDevice, ...]:
        """Hosts as measured; speed on the experts of an average layer; slots that the memory holds beside the rest.

        With more ``slots`` than experts the devices have so many in all, as even as memory allows. Memory is counted as
        engines hold the weights: in the format that they are stored in, scales included, and else in ``dtype``.
        """
        check_shape(trace, self.model)
        if not trace.tells_movement:
            what = "counts only" if trace.counts_only else "choices of identity experts"
            raise MoeplanError(f"predicted time needs a trace of tokens, this one has {what}: leave out --cluster")
        counts = self._counts(trace)
        speed = expert_speeds(self.costs, self.model, counts)
        expert = sum(self.model.expert_bytes(i, self.dtype) for i in range(trace.layers))
        rest = self.model.rest_bytes(self.dtype)
        fitting = [int((USED_MEMORY * d.memory_bytes - rest) // expert) for d in self.cluster.devices]
        capacity = np.clip(fitting, 0, trace.num_experts)
        if equal_slots:
            even_fleet(
                len(fitting), 1, slots, equal_slots, trace.num_experts
            )  # names the engines' rule where it is broken
            capacity = np.where(capacity >= slots // len(fitting), slots // len(fitting), 0)
        elif slots > trace.num_experts:
            capacity = spread_slots(capacity, slots)
        if capacity.sum() < slots or capacity.min() < 1:
            lacking = max(0, slots - int(capacity.sum()))
            raise InfeasibleError(
                f"the memory of the devices holds {capacity.tolist()} experts of every layer, {slots} are wanted"
                + (f": {lacking} slots, {bytes_text(lacking * expert)} are missing" if lacking else "")
            )
        return tuple(
            PlacementDevice(host=d.host, speed=float(s), capacity=int(c))
            for d, s, c in zip(self.cluster.devices, speed, capacity, strict=True)
        )

    @cached_property
    def division(self) -> tuple[str, Layout]:
        """How the step's tokens are divided, as text: as ``solve`` tries first, where the cluster has the curves."""
        try:
            name, layout = next(iter(layouts(self.costs, self.model, self.workload).items()))
        except MissingCurveError:
            layout = Layout.of(self.workload, 1, even(self.workload.sequences, self.costs.devices))
            return "evenly, for want of attention curves in the cluster", layout
        return f"as `solve` tries first ({name})", layout

    @property
    def note(self) -> str:
        """What predictions assume of the tokens."""
        return f"times are of dispatch, experts and combine, with tokens divided {self.division[0]}"

    @property
    def minimised(self) -> str:
        """What is minimised."""
        return f"predicted seconds of dispatch, experts and combine of a step {self.workload}"

    def seconds(self, layers: Sequence[PlacementLayer], trace: Trace) -> float:
        """Predicted seconds of dispatch, experts and combine over all layers of a step drawn from ``trace``."""
        total = 0.0
        group = tuple(range(self.costs.devices))
        for layer, placed in zip(self._step(trace), layers, strict=True):
            sent = layer.choices.dispatch([layer_plan(placed)])
            out = self.costs.all_to_all(group, sent.rows.times(layer.row_bytes))
            back = self.costs.all_to_all(group, sent.back.times(layer.activation_bytes))
            experts = layer.experts(sent.experts)
            total += float(out.seconds.max() + experts.seconds.max() + back.seconds.max())
        return total

    def bound(self, trace: Trace) -> float:
        """No placement is predicted faster: all devices busy at the best rate of their curves, exchanges for nothing.

        A device takes at least its least seconds per row, over the whole curve, for each row; curves are linear
        between measured points, so that the least is at a point or in the last slope.
        """
        block = self.model.moe_block()
        assert block.moe is not None
        rate = 0.0
        for g in range(self.costs.devices):
            table = self.costs.table(g, "expert_ffn", expert_shape(block))
            axes = dict(zip((axis.name for axis in table.axes), table.values, strict=True))
            experts = np.append(axes["experts"], block.moe.num_experts)[:, None]
            tokens = np.append(axes["tokens"], 1e3 * axes["tokens"][-1])[None, :]
            seconds, _ = table.read(ffn=block.moe.ffn_size, experts=experts, tokens=tokens)
            rate += 1 / float((seconds / (experts * tokens)).min())
        return float(self._counts(trace).sum()) / rate

    def weights(self, trace: Trace) -> tuple[float, float]:
        """Seconds of a whole layer's exchange per mean row of a token inside a host, and between hosts."""
        layer = self._step(trace)[0]
        return exchange_weights(self.costs, (layer.row_bytes + layer.activation_bytes) * self.workload.tokens)

    def _step(self, trace: Trace) -> list[Layer]:
        """One layer per mixture-of-experts layer, with the same tokens for every placement."""
        _, layout = self.division
        ids = traced_routing(trace, self.workload, self.seed).expert_ids
        blocks = [self.model.layers[i] for i in self.model.moe_layers]
        return [Layer.of(self.costs, block, layout, ids[None, :, i]) for i, block in enumerate(blocks)]

    def _counts(self, trace: Trace) -> np.ndarray:
        """[L, E] token-expert pairs of a step, as the whole trace has them on average."""
        return trace.expert_counts * (self.workload.tokens / trace.tokens)


def place_for_time(
    single: Single,
    trace: Trace,
    timing: Timing,
    candidates: Mapping[str, Slots],
    *,
    steps: int | None = None,
    budget: Budget,
) -> Solution[Slots]:
    """The fastest predicted of ``candidates``, by name, and of single copies annealed at several prices of balance.

    single: carries the weights of ``Timing.weights``. Objective and bound in seconds.
    """
    began = time.perf_counter()
    predicting = time.perf_counter()
    seconds = [timing.seconds(document_layers(slots), trace) for slots in candidates.values()]
    each = (time.perf_counter() - predicting) / max(len(candidates), 1)
    searching = budget.before(SAFETY_FACTOR * each * len(PRICES))
    affinity, load = single.affinity(trace, searching.part(AFFINITY_TIME)), load_samples(trace)
    if len(trace.seq_len) <= WHOLE_SEQUENCES:
        load = windows(trace)  # samples of few sequences are rough: trials fit a cap to them, but nothing fits a price
    ideal = timing.bound(trace) / trace.layers
    names, tried, late = list(candidates), list(candidates.values()), False
    for i, price in enumerate(PRICES):
        if tried and searching.late:
            late = True
            budget.skip(f"{len(PRICES) - i} of {len(PRICES)} prices of balance")
            break
        found = single.solve(
            affinity,
            load,
            price=price * ideal,
            steps=steps,
            budget=searching.part(1 / (len(PRICES) - i)),
        )
        late |= found.status == "time_limit"
        tried.append(Slots.from_device_of(found.assignment, single.fleet.capacity))
        seconds.append(timing.seconds(document_layers(tried[-1]), trace))
    best = int(np.argmin(seconds))
    solver = names[best] if best < len(candidates) else "annealing"
    bound = min(timing.bound(trace), seconds[best])
    solution = Solution.from_heuristic(tried[best], seconds[best], bound, time.perf_counter() - began, solver)
    return replace(solution, status="time_limit") if late and solution.status == "feasible" else solution

"""Candidate divisions of a step: tensor degrees, sequences over groups, FFN columns over devices.

Even ones, and those that `solvers.split` proves best on the measured curves.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from ..solvers.result import Infeasible
from ..solvers.splits.split import split
from ..spec.errors import MissingCurveError
from ..spec.layout import even
from ..spec.model import Block, Model
from ..spec.operators import attention_shape, expert_shape, mixer_shape, route_shape
from ..spec.routing import Routing, chosen_counts
from ..spec.workload import Workload
from .costs import Costs
from .layout import Layout

GRANULES = 32  # pieces that an FFN is divided into, ...
LEAST_COLUMNS = 16  # ... of at least so many columns each
KNOTS = 17  # sequence counts at which the experts' time is read from the actual routing; linear between them
SAMPLED_LAYERS = 4
MOST_SHARE = 16  # times an even share that one group may take, ...
MOST_ENTRIES = 2**22  # ... where a table of all counts has more entries


def tensor_degrees(costs: Costs, model: Model) -> list[int]:
    """Degrees that divide devices and heads, stay inside a host, and were measured; 1 always."""
    return [t for t in _possible_degrees(costs, model) if t == 1 or _measured(costs, model, t)]


def unmeasured_degrees(costs: Costs, model: Model) -> list[int]:
    """Degrees that could be searched if the cluster had curves of their groups or shapes."""
    return [t for t in _possible_degrees(costs, model) if t > 1 and not _measured(costs, model, t)]


def _possible_degrees(costs: Costs, model: Model) -> list[int]:
    if any(block.shortcut != "none" or block.counted for block in model.blocks):
        # What a group exchanges beside other collectives is not predicted; Transformers' modules are not divided.
        return [1]
    attentions = [block.attention for block in model.blocks if block.attention]

    def possible(t: int) -> bool:
        if costs.devices % t or any(a.heads % t or a.kv_heads % t for a in attentions):
            return False
        return not any(len(set(costs.hosts[first : first + t])) > 1 for first in range(0, costs.devices, t))

    return [t for t in range(1, costs.devices + 1) if possible(t)]


def _measured(costs: Costs, model: Model, t: int) -> bool:
    attentions = [block.attention for block in model.blocks if block.attention]
    try:
        for first in range(0, costs.devices, t):
            group = tuple(range(first, first + t))
            costs.cluster.collective("all_gather", group)
            costs.cluster.collective("reduce_scatter", group)
            if any(a.qk_norm == "full" for a in attentions):
                costs.cluster.collective("all_reduce", group)
        for block in dict.fromkeys(model.layers):
            for device in costs.representatives if block.attention else ():
                for phase in ("attention_prefill", "attention_decode"):
                    costs.table(device, phase, attention_shape(block, t))
    except MissingCurveError:
        return False
    return True


def layouts(
    costs: Costs, model: Model, workload: Workload, routing: Routing | None = None, only_even: bool = False
) -> dict[str, Layout]:
    """Named layouts: for each tensor degree even; balanced by attention; and by attention and experts together.

    The last is for gathered layers, whose devices compute their own tokens only, and needs the step's ``routing``. In
    order of the slowest group's time outside the experts: the most promising come first. ``only_even`` leaves the
    others out.
    """
    found: list[tuple[float, str, Layout]] = []
    for tensor in tensor_degrees(costs, model):
        groups, total = costs.devices // tensor, workload.sequences
        choices = {"even": even(total, groups)}
        counts = np.arange(min(total, max(MOST_SHARE * -(-total // groups), MOST_ENTRIES // groups)) + 1)
        outside = _attention_seconds(costs, model, workload, tensor, counts)
        if not only_even:
            choices["balanced attention"] = split(outside, total, partial=True).assignment
        if routing is not None and not only_even:
            together = outside + _expert_seconds(costs, model, workload, routing, tensor, counts)
            choices["balanced layers"] = split(together, total, partial=True).assignment
        for name, sequences in choices.items():
            layout = Layout.of(workload, tensor, sequences)
            slowest = max(outside[group, count] for group, count in enumerate(sequences))
            if all(layout != other for _, _, other in found):
                found.append((slowest, f"tensor {tensor}, {name}", layout))
    return {name: layout for _, name, layout in sorted(found, key=lambda entry: entry[0])}


def _attention_seconds(costs: Costs, model: Model, workload: Workload, tensor: int, counts: np.ndarray) -> np.ndarray:
    """[groups, counts] seconds of attention and routing in a step for each count of sequences."""
    tokens = -(-counts * workload.length // tensor)
    total = np.zeros((len(costs.representatives), len(counts)))
    for block, layers in Counter(model.layers).items():
        for kind, device in enumerate(costs.representatives):
            if block.attention is not None:
                shape = attention_shape(block, tensor)
                if workload.phase == "prefill":
                    table = costs.table(device, "attention_prefill", shape)
                    seconds = table.read(sequences=counts, length=workload.length)[0]
                else:
                    table = costs.table(device, "attention_decode", shape)
                    seconds = table.read(sequences=counts, context=max(workload.context, 1))[0]
                total[kind] += layers * seconds
            elif block.counted is not None:
                total[kind] += layers * _mixer_seconds(costs, block, workload, device, counts)
            if block.moe is not None and block.counted is None:
                total[kind] += layers * costs.table(device, "route", route_shape(block)).read(tokens=tokens)[0]
    return costs.of_devices(total).reshape(-1, tensor, len(counts)).max(1)


def _mixer_seconds(costs: Costs, block: Block, workload: Workload, device: int, counts: np.ndarray) -> np.ndarray:
    """[counts] seconds of one layer that Transformers computes."""
    table = costs.table(device, f"mixer_{workload.phase}", mixer_shape(block))
    if workload.phase == "prefill":
        return table.read(sequences=counts, length=workload.length)[0]
    return table.read(sequences=counts, context=max(workload.context, 1))[0]


def _expert_seconds(
    costs: Costs, model: Model, workload: Workload, routing: Routing, tensor: int, counts: np.ndarray
) -> np.ndarray:
    """[groups, counts] seconds of all experts on a group's own tokens, by the routing of the first sequences."""
    knots = np.unique(np.linspace(0, counts[-1], KNOTS).round().astype(int))
    ordinals = np.unique(np.linspace(0, len(model.moe_layers) - 1, SAMPLED_LAYERS).astype(int))
    seconds = np.zeros((len(costs.representatives), len(knots)))
    tokens = -(-knots * workload.length // tensor)
    for j in ordinals:
        block = model.moe_block(int(j))
        assert block.moe is not None
        rows = _first_rows(routing, int(j), tokens, block.moe.num_experts)
        for kind, device in enumerate(costs.representatives):
            seconds[kind] += costs.expert_ffn(block, block.moe.ffn_size, rows, device)
    seconds *= len(model.moe_layers) / len(ordinals)
    table = np.stack([np.interp(counts, knots, row) for row in seconds])
    return costs.of_devices(table).reshape(-1, tensor, len(counts)).max(1)


def _first_rows(routing: Routing, ordinal: int, tokens: np.ndarray, experts: int) -> np.ndarray:
    """[len(tokens), experts] rows of the first so many tokens in one layer; expected ones where there is a sample."""
    chosen = routing.by_layer[ordinal]
    if routing.scale != 1:
        return tokens[:, None] * chosen_counts(chosen, experts) / len(chosen)
    return np.stack([chosen_counts(chosen[:n], experts) for n in tokens])


class FfnSplits:
    """Splits of the FFN columns for layers that share one plan; counts: [len(ordinals), experts] tokens.

    Granules of columns; what does not fill a granule goes to the device with the most columns.
    """

    def __init__(self, costs: Costs, model: Model, ordinals: Sequence[int], counts: np.ndarray) -> None:
        block = model.moe_block(ordinals[0])
        assert block.moe is not None
        self.ffn = block.moe.ffn_size
        granule = min(self.ffn, max(LEAST_COLUMNS, self.ffn // GRANULES))
        self.columns = np.arange(self.ffn // granule + 1) * granule
        whole = block.moe.num_experts * block.moe.expert_parameters(block.hidden_size) * costs.element_bytes
        self.bytes = self.columns * (whole / self.ffn)
        calls = np.broadcast_to(counts[:, None, :], (len(counts), len(self.columns), counts.shape[1]))
        kinds = [costs.expert_ffn(block, self.columns, calls, device).sum(0) for device in costs.representatives]
        self.seconds = costs.of_devices(np.stack(kinds))
        self.even = even(self.ffn, costs.devices)
        self.fastest = self._split(self.seconds)

    def within(self, available: np.ndarray) -> list[tuple[int, ...]]:
        """Even, fastest, and fastest within ``available``: [devices] bytes that a device has for such a layer."""
        if self.fastest is None:
            return [self.even]
        splits = [self.even, self._whole(self.fastest)]
        fits = self.bytes <= available[:, None]
        if not fits[np.arange(len(fits)), list(self.fastest)].all():
            with suppress(Infeasible):  # where an even share of memory is too little, other layers may leave more
                splits.append(self._whole(self._split(np.where(fits, self.seconds, np.inf)) or ()))
        return list(dict.fromkeys(splits))

    def _split(self, seconds: np.ndarray) -> tuple[int, ...] | None:
        """Granules of each device; None where there are fewer granules than devices, so that some would have none."""
        units = len(self.columns) - 1
        return split(seconds, units).assignment if units >= len(seconds) else None

    def _whole(self, units: Sequence[int]) -> tuple[int, ...]:
        """Columns of each device from granules."""
        taken = [int(self.columns[n]) for n in units]
        taken[taken.index(max(taken))] += self.ffn - sum(taken)
        return tuple(taken)


def expert_speeds(costs: Costs, model: Model, counts: np.ndarray) -> np.ndarray:
    """[devices] relative speed of each device on its even share of an average layer's experts; mean 1."""
    block = model.moe_block()
    mean = counts.mean()
    experts = -(-counts.shape[1] // costs.devices)
    at = {"ffn": block.moe.ffn_size if block.moe else 0, "experts": experts, "tokens": max(mean, 1.0)}
    kinds = [float(costs.table(d, "expert_ffn", expert_shape(block)).read(**at)[0]) for d in costs.representatives]
    speeds = 1 / np.maximum(costs.of_devices(np.array(kinds)), 1e-12)
    return speeds / speeds.mean()


def expert_seconds(costs: Costs, model: Model, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([layers, experts] seconds that each expert adds to a device of speed 1, [devices] speeds of mean 1).

    As ``Costs.expert_ffn`` reads a call with unequal rows: an expert takes its share of the call that would have its
    rows everywhere, here with as many active experts as an even share has. counts: [layers, experts] rows.
    """
    block = model.moe_block()
    assert block.moe is not None
    rows, at = np.unique(counts, return_inverse=True)
    active = -(-counts.shape[1] // costs.devices)
    seconds = []
    for device in costs.representatives:
        table = costs.table(device, "expert_ffn", expert_shape(block))
        found = table.read(ffn=block.moe.ffn_size, experts=active, tokens=np.maximum(rows, 1))[0] / active
        seconds.append(np.where(rows > 0, found, 0.0)[at].reshape(counts.shape))
    rate = 1 / np.maximum([own.sum() for own in seconds], 1e-300)
    speed = costs.of_devices(rate)
    of_kind = np.bincount(costs.kinds, minlength=len(rate)) * rate / speed.sum()
    return np.tensordot(of_kind, seconds, axes=1), speed / speed.mean()

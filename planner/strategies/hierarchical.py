"""hierarchical: tokens travel to hosts, one row per token and host, then inside them; partial sums come back.

In chunks, all start across hosts at once, one after another; while one crosses, the one before is relayed inside the
hosts, and the one before that is computed, in the plan's order (``spec.chunk_order``); the way back likewise.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from ...spec.chunk_order import Call, Order, calls
from ...spec.levels import across_groups, inside_groups
from ...spec.operators import Part, Shape, levels_shape
from ...spec.plan import LayerPlan
from ..choices import Forward
from ..costs import Exchange
from ..stages import Stage, compute, exchange, start, wait
from .layer import Layer, attention, route, shared

COUNT_BYTES = 16  # two int64 per pair and chunk, one for each level, exchanged before the rows
ACROSS, INSIDE = 0, 1  # lanes


class _Moved(NamedTuple):
    """What B layers, or one chunk of theirs, exchange: across hosts and inside them, there and back."""

    across: Exchange
    inside: Exchange
    back_inside: Exchange
    back_across: Exchange

    @classmethod
    def of(cls, layer: Layer, sent: Forward) -> "_Moved":
        costs, row, activation = layer.costs, layer.row_bytes, layer.activation_bytes
        across, inside = across_groups(costs.hosts), inside_groups(costs.hosts)
        return cls(
            costs.all_to_all_in(across, sent.across.times(row)),
            costs.all_to_all_in(inside, sent.inside.times(row)),
            costs.all_to_all_in(inside, sent.inside.back().times(activation)),
            costs.all_to_all_in(across, sent.across.back().times(activation)),
        )


def build(layer: Layer, plans: Sequence[LayerPlan]) -> list[Stage]:
    """Attention, route, pack, counts, across hosts, relay, inside hosts, unpack, experts, back inside, add, back
    across, combine, shared experts."""
    if plans[0].chunks > 1:
        return [*before(layer, plans[0].chunks), *flight(layer, plans), *shared(layer)]
    sent = layer.choices.forward(plans)
    moved = _Moved.of(layer, sent)
    return [
        *before(layer),
        exchange("dispatch", "across hosts", [moved.across]),
        _each(layer, "dispatch", "hierarchical_relay", sent.arrived),
        exchange("dispatch", "inside hosts", [moved.inside]),
        layer.each("dispatch", "ep_unpack", sent.computed),
        layer.experts(sent.experts),
        exchange("combine", "back inside hosts", [moved.back_inside]),
        _each(layer, "combine", "hierarchical_add", sent.arrived),
        exchange("combine", "back across hosts", [moved.back_across]),
        *after(layer),
    ]


def flight(layer: Layer, plans: Sequence[LayerPlan]) -> list[Stage]:
    """Rows in chunks, there and back."""
    return Flight.of(layer, plans).stages(plans[0].order)


class Flight(NamedTuple):
    """Rows of B layers in chunks, there and back, in any order of the calls.

    The transfers of chunk c are collectives 4 c to 4 c + 3, in the order in which it needs them.
    """

    begin: list[Stage]
    made: list[dict[Call, list[Stage]]]  # of each chunk
    end: list[Stage]

    @classmethod
    def of(cls, layer: Layer, plans: Sequence[LayerPlan]) -> "Flight":
        chunks = [_Chunk.of(part, plans, 4 * c) for c, part in enumerate(layer.chunks(plans[0].chunks))]
        return cls(
            [chunk.begin() for chunk in chunks],
            [{"relay": chunk.relay(), "experts": chunk.experts(), "add": chunk.add()} for chunk in chunks],
            [stage for chunk in chunks for stage in chunk.end()],
        )

    def stages(self, order: Order | None) -> list[Stage]:
        """None: the usual order."""
        called = (self.made[c][call] for call, c in calls(len(self.made), order))
        return [*self.begin, *chain.from_iterable(called), *self.end]


class _Chunk(NamedTuple):
    """One chunk of B layers; its transfers are collectives ``first`` to ``first`` + 3."""

    layer: Layer
    sent: Forward
    moved: _Moved
    first: int

    @classmethod
    def of(cls, layer: Layer, plans: Sequence[LayerPlan], first: int) -> "_Chunk":
        sent = layer.choices.forward(plans)
        return cls(layer, sent, _Moved.of(layer, sent), first)

    def begin(self) -> Stage:
        return self._across("dispatch", "across hosts", self.moved.across, 0)

    def relay(self) -> list[Stage]:
        call = _each(self.layer, "dispatch", "hierarchical_relay", self.sent.arrived)
        return [self._wait("dispatch", 0), call, self._inside("dispatch", "inside hosts", self.moved.inside, 1)]

    def experts(self) -> list[Stage]:
        unpack = self.layer.each("dispatch", "ep_unpack", self.sent.computed)
        back = self._inside("combine", "back inside hosts", self.moved.back_inside, 2)
        return [self._wait("dispatch", 1), unpack, self.layer.experts(self.sent.experts), back]

    def add(self) -> list[Stage]:
        call = _each(self.layer, "combine", "hierarchical_add", self.sent.arrived)
        return [self._wait("combine", 2), call, self._across("combine", "back across hosts", self.moved.back_across, 3)]

    def end(self) -> list[Stage]:
        combine = _each(self.layer, "combine", "hierarchical_combine", self.layer.tokens)
        return [self._wait("combine", 3), combine]

    def _across(self, part: Part, name: str, exchange: Exchange, number: int) -> Stage:
        """For all devices on one lane: the hosts' uplinks are for all groups."""
        busy = self.layer.costs.busy(exchange)
        return start(part, name, exchange, busy, self.first + number, ACROSS)

    def _inside(self, part: Part, name: str, exchange: Exchange, number: int) -> Stage:
        costs = self.layer.costs
        return start(
            part, name, exchange, costs.busy(exchange), self.first + number, INSIDE, inside_groups(costs.hosts)
        )

    def _wait(self, part: Part, number: int) -> Stage:
        return wait(part, self.layer.layout.devices, self.first + number)


def before(layer: Layer, chunks: int = 1) -> list[Stage]:
    """What no placement changes, up to the first exchange of rows."""
    counts = layer.costs.scatter(layer.devices, np.full((1, len(layer.devices)), COUNT_BYTES * chunks))
    pack = [_each(part, "dispatch", "hierarchical_pack", part.tokens) for part in layer.chunks(chunks)]
    return [*attention(layer), *route(layer), *pack, exchange("dispatch", "exchange counts", [counts])]


def after(layer: Layer) -> list[Stage]:
    """What no placement changes, from when the rows are back."""
    return [_each(layer, "combine", "hierarchical_combine", layer.tokens), *shared(layer)]


def least(layer: Layer) -> float:
    """Seconds that both exchanges of rows take at least, one way: what whoever takes part spends."""
    levels = (across_groups(layer.costs.hosts), inside_groups(layer.costs.hosts))
    return sum(min(layer.costs.least("all_to_all", group) for group in groups) for groups in levels)


def shape(layer: Layer) -> Shape:
    """Of this strategy's own operators."""
    return levels_shape(layer.block, layer.layout.devices, len(set(layer.costs.hosts)))


def _each(layer: Layer, part: Part, operator: str, rows: np.ndarray) -> Stage:
    """One call of such an operator on every device with its number of rows, [G] or [B, G]."""
    return compute(part, operator, layer.costs.operator(operator, shape(layer), tokens=rows))

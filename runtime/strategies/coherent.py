"""Coherent expert parallelism (ExFlow): a token stays on the device of its highest-weight expert.

T tokens that are here, D model, E experts, K top-k, G devices, N rows sent, M rows received, R tokens that stay here.

A layer sends the residual stream itself, one row per token and destination device as ``ep`` does, and nothing returns:
the device of the token's first expert keeps it, and the next layer begins there. The other devices of a token send
their partial output straight to that device. It knows whom to expect, because a row names, in the place of every expert
that is computed elsewhere, the device that computes it: the second exchange needs no counts, and with top-1 there is
none. Identity experts are nobody's: a row names them as those of a device G, and the token's next device adds their
part. A token that chose no other experts stays where it is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...spec.model import Moe
from ...spec.operators import NUMBER_BYTES
from ...spec.plan import LayerPlan
from ...spec.routing import COPY_PHASES, COPY_STEP
from ..collectives import all_to_all, exchange_counts
from ..kernels import expert_ffn
from ..norms import rms_norm
from ..router import add_identity
from ..weights import RouterWeights
from . import ep
from .layer import Lap, LayerContext, Stored
from .rows import empty_rows, fields, unpack

__all__ = ["Coherent", "Received", "combine", "pack", "receive"]


class Received(NamedTuple):
    """x, normed: [M, D]; ids [M, K] int32, -1 for experts elsewhere; weights [M, K] float32.

    number: [R] int64, rising, of the tokens that stay here; stays: [R] their rows. away: [A] rows whose partial output
    goes to another device, in the order of these; place: [P] which of the R each partial output to come belongs to.
    counts: [2, G] rows that go to, and come from, each device. identity: [M] float32 sums of the weights of identity
    experts; None where the model has none.
    """

    x: Tensor
    normed: Tensor
    ids: Tensor
    weights: Tensor
    number: Tensor
    stays: Tensor
    away: Tensor
    place: Tensor
    counts: Tensor
    identity: Tensor | None


def pack(
    x: Tensor, ids: Tensor, weights: Tensor, number: Tensor, table: ep.Serving, phase: Tensor, home: int | None = None
) -> tuple[Tensor, Tensor]:
    """x [T, D] residual stream, ids [T, K] int64, weights [T, K] f32, number [T] int64, phase [T, 1] -> rows
    [N, row bytes + NUMBER_BYTES] ordered by destination, then token; rows for each device [G] int64.

    A row's id is an index among the destination's experts, or -1 - d where device d computes the expert, d = G for
    identity experts (id -1). home: the tokens' device, where they may have chosen these alone.
    """
    destination, slot = ep.served(ids, table, phase)
    to = destination
    if home is not None:
        to = destination.masked_fill((destination == table.devices).all(1, keepdim=True), home)
    target, token, counts = ep.fan_out(to, table.devices)
    rows = empty_rows(len(token), x, ids.shape[1], NUMBER_BYTES)
    row_x, row_ids, row_weights = fields(rows[:, :-NUMBER_BYTES], x.shape[1], x.dtype, ids.shape[1])
    torch.index_select(x, 0, token, out=row_x)
    at = destination.index_select(0, token)
    row_ids.copy_(torch.where(at == target.unsqueeze(1), slot.index_select(0, token), -1 - at))
    torch.index_select(weights, 0, token, out=row_weights)
    rows[:, -NUMBER_BYTES:].view(torch.int32)[:, 0].copy_(number.index_select(0, token))
    return rows, counts


def phases(number: Tensor) -> Tensor:
    """[T, 1] int64: the phase of each token."""
    return ((number * COPY_STEP) % COPY_PHASES).unsqueeze(1)


def receive(rows: Tensor, router: RouterWeights, moe: Moe, rank: int, devices: int) -> Received:
    """rows [M, row bytes + NUMBER_BYTES], ordered by source, then token number; normalised as the router's input is."""
    weight, nobody, identity = router.norm, -1 - devices, None
    x, ids, gates = unpack(rows[:, :-NUMBER_BYTES], len(weight), weight.dtype, moe.top_k)
    first = ids[:, 0].long()
    if moe.zero_experts:
        named = ids != nobody
        identity = gates.masked_fill(named, 0.0).sum(1)
        first = ids.gather(1, named.byte().argmax(1, keepdim=True))[:, 0].long()  # the first that somebody computes
    here = (first >= 0) | (first == nobody)
    stays = here.nonzero()[:, 0]
    number = rows[:, -NUMBER_BYTES:].view(torch.int32)[:, 0].index_select(0, stays).long()
    number, order = number.sort()
    # Each device sends its rows in the order in which it got them, which for common tokens is the order here.
    at = torch.where(ids >= 0, rank, -1 - ids).index_select(0, stays).long()
    expected = torch.zeros((devices + 1, len(stays)), dtype=torch.bool, device=x.device)
    expected = expected.scatter_(0, at.t(), True)[:devices]
    expected[rank] = False
    rank_of = torch.empty_like(order)
    rank_of[order] = torch.arange(len(order), device=x.device)
    place = rank_of.index_select(0, expected.nonzero()[:, 1])
    away = (~here).nonzero()[:, 0]
    to, turn = (-1 - first.index_select(0, away)).sort(stable=True)
    counts = torch.stack([torch.bincount(to, minlength=devices), expected.sum(1)])
    normed = rms_norm(x, weight, router.eps)
    stays, away = stays.index_select(0, order), away.index_select(0, turn)
    return Received(x, normed, ids.clamp(min=-1), gates, number, stays, away, place, counts, identity)


def combine(y: Tensor, arrived: Tensor, received: Received) -> Tensor:
    """y [M, D] partial outputs of the rows here, arrived [P, D] of other devices -> residual stream [R, D] of the
    tokens that stay; summed in f32."""
    x, stays = received.x, received.stays
    total = x.index_select(0, stays).float() + y.index_select(0, stays).float()
    if received.identity is not None:
        total = add_identity(total, received.normed.index_select(0, stays), received.identity.index_select(0, stays))
    return total.index_add_(0, received.place, arrived.float()).to(x.dtype)


class Coherent:
    """One layer on one device; what it stores is as in ``strategies.Strategy``."""

    def __init__(self, plan: LayerPlan, context: LayerContext) -> None:
        c = context
        self._table = ep.serving(plan, c.hosts, c.moe.num_experts, c.rank, c.device)
        self._moe, self._rank = c.moe, c.rank
        self.stored = Stored(experts=plan.slots[c.rank], columns=(0, c.moe.ffn_size))

    def prepare(self, gate_up: Tensor, down: Tensor) -> None:
        self._gate_up, self._down = gate_up, down

    def forward(
        self, x: Tensor, ids: Tensor, weights: Tensor, number: Tensor, router: RouterWeights, lap: Lap
    ) -> tuple[Tensor, Received]:
        """x [T, D] residual stream, ids, weights [T, K], number [T] rising -> residual stream [R, D] of the tokens that
        stay here, and what was received. Identity experts have the ids from E on, or -1."""
        moe, home = self._moe, None
        if moe.zero_experts:
            ids, home = ids.masked_fill(ids >= moe.num_experts, -1), self._rank
        rows, send = pack(x, ids, weights, number, self._table, phases(number), home)
        there, here = torch.stack([send, exchange_counts(send)]).tolist()
        came = receive(all_to_all(rows, there, here), router, moe, self._rank, self._table.devices)
        lap("dispatch")
        activation = moe.activation
        y = expert_ffn(came.normed, self._gate_up, self._down, came.ids, came.weights, activation=activation)
        lap("expert")
        arrived = y.index_select(0, came.away)
        if moe.top_k > 1:
            arrived = all_to_all(arrived, *came.counts.tolist())
        x = combine(y, arrived, came)
        lap("combine")
        return x, came

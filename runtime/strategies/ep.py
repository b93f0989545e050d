"""Expert parallelism: tokens travel to the experts and back, one row per token and destination device.

T tokens, D model, E experts, K top-k, G devices, P phases of the copy table, N rows sent, M rows received.

A token whose experts share a device crosses the wire once: the row names its experts there, the device returns one
gate-weighted partial row, and the token's owner adds the partial rows up. A choice of expert -1 is none (an identity
expert's, which the token's owner adds): nothing is sent for it. Replicated experts are served by the copy
that ``spec.routing.copy_table`` names, or, by batch, by those that ``by_batch`` finds.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...spec.layout import even
from ...spec.plan import LayerPlan
from ...spec.routing import COPY_PHASES, COPY_STEP
from ..collectives import Pending, all_to_all_start, exchange_counts
from ..groups import Group
from ..layout import Layout
from .by_batch import ByBatch
from .layer import Experts, Lap, LayerContext, Stored, experts_of
from .rows import empty_rows, fields, unpack
from .serving import Serving, serving

__all__ = ["ExpertParallel", "Serving", "combine", "fan_out", "pack", "served", "serving", "unpack"]


@lru_cache(maxsize=8)
def phases(first: int, tokens: int, device: torch.device) -> Tensor:
    """[T, 1] int64: the phase of each token of global index first, first + 1, ..."""
    index = torch.arange(first, first + tokens, device=device)
    return ((index * COPY_STEP) % COPY_PHASES).unsqueeze(1)


def served(ids: Tensor, table: Serving, phase: Tensor) -> tuple[Tensor, Tensor]:
    """[T, K] device that serves each choice, and the expert's index there, (G, -1) for expert -1; ids: [T, K], phase:
    [T, 1]."""
    entry = ids if table.device.dim() == 1 else (ids, phase)
    return table.device[entry], table.slot[entry]


def fan_out(destination: Tensor, devices: int) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct pairs of a token and a destination [T, K] below G, ordered by destination, then token: destination [N],
    token [N]; how many for each device [G]."""
    wanted = torch.zeros((devices + 1, len(destination)), dtype=torch.bool, device=destination.device)
    wanted = wanted.scatter_(0, destination.t(), True)[:devices]
    target, token = wanted.nonzero(as_tuple=True)
    return target, token, wanted.sum(1)


def pack(x: Tensor, ids: Tensor, weights: Tensor, table: Serving, phase: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """De-duplicated send buffer.

    x [T, D], ids [T, K] int64 experts, -1 for none, weights [T, K] f32, phase [T, 1]. Returns rows [N, row bytes]
    ordered by destination, then token; the token of each row [N] int64; rows for each device [G] int64. A row's ids are
    indices among the destination's experts, -1 where another device serves, or none.
    """
    destination, slot = served(ids, table, phase)
    target, token, counts = fan_out(destination, table.devices)
    rows = empty_rows(len(token), x, ids.shape[1])
    row_x, row_ids, row_weights = fields(rows, x.shape[1], x.dtype, ids.shape[1])
    torch.index_select(x, 0, token, out=row_x)
    here = destination.index_select(0, token) == target.unsqueeze(1)
    row_ids.copy_(torch.where(here, slot.index_select(0, token), -1))
    torch.index_select(weights, 0, token, out=row_weights)
    return rows, token, counts


def combine(returned: Tensor, token: Tensor, residual: Tensor) -> Tensor:
    """residual [T, D] plus each returned partial row [N, D] at its token [N]; summed in f32."""
    return residual.float().index_add(0, token, returned.float()).to(residual.dtype)


class ExpertParallel:
    """One layer; see ``strategies.Strategy``."""

    def __init__(self, plan: LayerPlan, context: LayerContext) -> None:
        c = context
        self._table = serving(plan, c.hosts, c.moe.num_experts, c.rank, c.device)
        self._by_batch = ByBatch(plan, c.moe.num_experts, c.device, c.group) if plan.speeds is not None else None
        self._group = c.group
        self._activation, self._chunks, self.slot = c.moe.activation, plan.chunks, plan.slot
        self.stored = Stored(experts=plan.slots[c.rank], columns=(0, c.moe.ffn_size))

    def prepare(self, gate_up: Tensor, down: Tensor) -> None:
        self.hold(experts_of(gate_up, down, self._activation))

    def hold(self, experts: Experts) -> None:
        """What computes them, in the place of ``prepare``."""
        self._experts = experts

    def start(self) -> bool:
        """Nothing to fetch: the weights stay."""
        return False

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor, layout: Layout, lap: Lap) -> Tensor:
        flight = self.begin(x, ids, weights, layout, lap)
        self.compute(flight, lap)
        return self.end(flight, residual, lap)

    def begin(self, x: Tensor, ids: Tensor, weights: Tensor, layout: Layout, lap: Lap) -> "Flight":
        """Send every token to its experts; all chunks leave at once."""
        table = self._table if self._by_batch is None else self._by_batch(ids)
        sizes = even(len(x), self._chunks)
        phase = phases(layout.first, len(x), x.device)
        parts = zip(*(t.split(sizes) for t in (x, ids, weights, phase)), strict=True)
        packed = [pack(rows, chosen, gates, table, at) for rows, chosen, gates, at in parts]
        rows, tokens, sends = zip(*packed, strict=True)
        told = torch.cat([torch.stack(sends, dim=1), *self._news(ids, phase)], dim=1)  # [G, chunks + N]
        told, heard = torch.stack([told, exchange_counts(told, self._group)]).transpose(1, 2).numpy(force=True)
        sent, received = told[: self._chunks].tolist(), heard[: self._chunks].tolist()
        arriving = [all_to_all_start(*part, self._group) for part in zip(rows, sent, received, strict=True)]
        lap("dispatch")
        news = heard[self._chunks :]
        return Flight(x.shape[1], x.dtype, ids.shape[1], sizes, tokens, sent, received, arriving, [], news, self._group)

    def _news(self, ids: Tensor, phase: Tensor) -> list[Tensor]:
        """[G, n] int64 each: what every device is told beside how many rows come. Here nothing."""
        return []

    def compute(self, flight: "Flight", lap: Lap) -> None:
        """The experts of each chunk as it comes; its rows leave as they are ready."""
        for c, (rows, pending) in enumerate(flight.arriving):
            pending.wait()
            x, ids, weights = unpack(rows, flight.hidden, flight.dtype, flight.top_k)
            lap("dispatch")
            y = self._experts(x, ids, weights)
            lap("expert")
            flight.send_back(c, y)
        flight.arriving.clear()

    def end(self, flight: "Flight", residual: Tensor, lap: Lap) -> Tensor:
        """Residual [T, D] plus what came back."""
        sums = []
        for (rows, pending), token, part in zip(
            flight.leaving, flight.tokens, residual.split(flight.sizes), strict=True
        ):
            pending.wait()
            sums.append(combine(rows, token, part))
        lap("combine")
        return sums[0] if len(sums) == 1 else torch.cat(sums)


class Flight(NamedTuple):
    """One layer's tokens on their way, in chunks.

    sizes: tokens of each chunk; tokens: of each chunk's rows; sent, received: [chunks][G] rows; arriving, leaving: rows
    of each chunk that come to the experts here, and that come back; news: [N, G] what each device told besides.
    """

    hidden: int
    dtype: torch.dtype
    top_k: int
    sizes: tuple[int, ...]
    tokens: tuple[Tensor, ...]
    sent: list[list[int]]
    received: list[list[int]]
    arriving: list[tuple[Tensor, Pending]]
    leaving: list[tuple[Tensor, Pending]]
    news: np.ndarray
    group: Group = None

    def send_back(self, chunk: int, y: Tensor) -> None:
        """Partial outputs [rows received, D] of a chunk begin their way home."""
        self.leaving.append(all_to_all_start(y, self.received[chunk], self.sent[chunk], self.group))

"""Offload: expert parallelism of devices whose memory does not hold their experts; the others rest on a disk.

T tokens of this device, M rows received, D model, K top-k, G devices, L experts of this device.

Tokens travel as under ``ep``. With how many rows come, every device is told which of its experts they need, so that
reading begins before the rows are there; beside a backbone (``spec.shortcut``), long before. Where the plan foresees
what the next layer needs (``spec.foresight``), it is told what all tokens chose. The experts that stay in
memory are computed first, meanwhile the others are read, and each is computed as it comes (``spec.offload`` says in
which order). Only rows of an expert go through it. Where experts rest in the memory of a GPU's host, those with few
rows are computed there by its processor, beside what the GPU computes.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...spec.offload import Cold
from ...spec.plan import LayerPlan
from ..kernels import expert_ffn
from ..layout import Layout
from ..tiers import HOST
from .ep import ExpertParallel, Flight, served, unpack
from .layer import Lap, LayerContext, Stored
from .serving import Serving

__all__ = ["Offload", "add", "by_expert", "on_host", "select", "wanted"]


class Offload(ExpertParallel):
    """One layer; see ``strategies.Strategy``."""

    def __init__(self, plan: LayerPlan, context: LayerContext) -> None:
        super().__init__(plan, context)
        assert context.resting is not None
        assert plan.resident is not None
        rank = context.rank
        self._resting, self._ordinal = context.resting, context.ordinal
        self._slots, stays = plan.slots[rank], plan.resident[rank]
        self._most, self._num_experts = max(map(len, plan.slots)), context.moe.num_experts
        self._cold = Cold([], [])  # what the tokens under way need from outside memory
        resting = tuple(expert for expert in self._slots if expert not in set(stays))
        self.stored = Stored(experts=stays, columns=(0, context.moe.ffn_size), resting=resting)
        number = {expert: i for i, expert in enumerate(stays)}
        numbers = [*(number.get(expert, -1) for expert in self._slots), -1]  # the last for -1 itself
        self._in_memory = torch.tensor(numbers, dtype=torch.int32, device=context.device)

    def begin(self, x: Tensor, ids: Tensor, weights: Tensor, layout: Layout, lap: Lap) -> Flight:
        """Send every token, and have read what comes here needs."""
        flight = super().begin(x, ids, weights, layout, lap)
        heard = flight.news.sum(1)
        self._cold = self._resting.need(self._ordinal, heard[: len(self._slots)], heard[self._most :])
        return flight

    def _news(self, ids: Tensor, phase: Tensor) -> list[Tensor]:
        news = [wanted(ids, self._table, phase, self._most)]
        if self._resting.foresees:  # the tokens of each expert, wherever it is
            chosen = torch.bincount(ids.flatten() + 1, minlength=self._num_experts + 1)[1:]  # -1 is no expert
            news.append(chosen.expand(self._table.devices, -1))
        return news

    def compute(self, flight: Flight, lap: Lap) -> None:
        for c, (rows, pending) in enumerate(flight.arriving):
            pending.wait()
            x, ids, weights = unpack(rows, flight.hidden, flight.dtype, flight.top_k)
            lap("dispatch")
            y = self._computed(x, ids, weights, lap)
            flight.send_back(c, y)
        flight.arriving.clear()

    def _computed(self, x: Tensor, ids: Tensor, weights: Tensor, lap: Lap) -> Tensor:
        """x [M, D], ids [M, K] int32 places in the slots or -1, weights [M, K] f32 -> partial outputs [M, D]."""
        choices, counts = by_expert(ids, len(self._slots))
        first = np.cumsum(counts) - counts + ids.numel() - counts.sum()

        def rows(i: int) -> Rows:
            return select(x, weights, choices[first[i] : first[i] + counts[i]])

        # A GPU hands these over before it has work that copies would wait for; its memory keeps only where they were.
        handed = [(self._slots[i], rows(i).to(HOST)) for i in self._cold.host]
        y = self._experts(x, self._in_memory[ids.long()], weights)
        lap("expert")
        if not self._cold.read and not handed:
            return y
        total = y.float()
        for expert, there in handed:
            part = on_host(there, *self._resting.rests(self._ordinal, expert), self._activation)
            add(total, part.to(x.device), there)
        if handed:
            lap("expert")
        for i in self._cold.read:
            gate_up, down = self._resting.take(self._ordinal, self._slots[i])
            lap("gather")
            mine = rows(i)
            part = expert_ffn(mine.x, gate_up, down, mine.ids, mine.weights, activation=self._activation)
            add(total, part, mine)
            self._resting.give_back(self._ordinal, self._slots[i])
            lap("expert")
        return total.to(y.dtype)


class Rows(NamedTuple):
    """Of one expert: x [n, D], ids [n, 1] int32, all 0, weights [n, 1] f32, and which of all rows they are [n]."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> "Rows":
        """The same there, but for ``rows``, which are needed where the sum is."""
        return Rows(self.x.to(device), self.ids.to(device), self.weights.to(device), self.rows)


def wanted(ids: Tensor, table: Serving, phase: Tensor, most: int) -> Tensor:
    """[G, most] int64: how many of the choices ids [T, K] each device's expert in each of its slots serves; phase:
    [T, 1]; most: slots of a device."""
    device, slot = served(ids, table, phase)
    places = table.devices * most
    number = torch.where(slot < 0, places, device * most + slot)  # the last for those of no expert
    return torch.bincount(number.flatten(), minlength=places + 1)[:places].view(-1, most)


def by_expert(ids: Tensor, experts: int) -> tuple[Tensor, np.ndarray]:
    """ids [M, K] of 0..experts - 1, or -1 -> choices [M K] int64 ordered by expert, -1 first; [experts] how many."""
    flat = ids.flatten()
    counts = torch.bincount(flat + 1, minlength=experts + 1)[1:]
    return flat.argsort(stable=True), counts.numpy(force=True)


def select(x: Tensor, weights: Tensor, choices: Tensor) -> Rows:
    """The rows of the choices [n] of one expert; x [M, D], weights [M, K]."""
    rows = choices // weights.shape[1]
    ids = torch.zeros((len(rows), 1), dtype=torch.int32, device=x.device)
    return Rows(x.index_select(0, rows), ids, weights.flatten().index_select(0, choices).unsqueeze(1), rows)


def on_host(mine: Rows, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Outputs [n, D] of rows in the host's memory, by its processor; gate_up [1, M, H, D] and down [1, D, H] there."""
    return expert_ffn(mine.x, gate_up, down, mine.ids, mine.weights, activation=activation)


def add(total: Tensor, part: Tensor, mine: Rows) -> None:
    """One expert's outputs [n, D] into the sum [M, D] f32."""
    total.index_add_(0, mine.rows, part.float())

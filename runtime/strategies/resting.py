"""The experts of all ``offload`` layers that rest outside a device's memory, by layer and expert.

Who computes a layer asks for what its tokens ``need``, then takes each in that order. What is read, and when, is the
rule of ``spec.offload``.

D model, M matrices into the FFN (2 gated, 1 plain), H FFN columns.
"""

from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...spec import Plan
from ...spec.foresight import Foreseen, foreseen
from ...spec.offload import Cold, cold_experts
from ..reader import Reader
from ..tiers import ExpertFile, HostMemory, Tier, places_for


class Needs(NamedTuple):
    """What a device read so far, in experts; see ``spec.offload.Reads``."""

    needed: int
    listed: int
    ahead: int
    vain: int
    host: int


class Resting:
    """Of one device of a plan. Raises MoeplanError where the tier has no space for them."""

    def __init__(self, plan: Plan, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        assert plan.offload is not None
        self._layers, self._rank, self._dtype = plan.layers, rank, dtype
        self._entries: dict[tuple[int, int], int] = {}
        self._shapes: list[tuple[tuple[int, ...], ...]] = []
        self._early: tuple[int, ...] = ()  # experts of the layer that comes next that are read ahead, in order
        self._foreseen = _foreseen(plan, rank)
        sizes = [1]
        for ordinal, layer in enumerate(plan.layers):
            block = plan.model.moe_block(ordinal)
            moe, hidden = block.moe, block.hidden_size
            assert moe is not None
            assert layer.resident is not None
            stays = set(layer.resident[rank])
            for expert in layer.slots[rank]:
                if expert not in stays:
                    self._entries[ordinal, expert] = len(self._entries)
            self._shapes.append(((2 if moe.gated else 1, moe.ffn_size, hidden), (hidden, moe.ffn_size)))
            sizes.append(sum(map(prod, self._shapes[-1])) * dtype.itemsize)
        places = plan.offload.places[rank] if self._entries else 0
        buffer = places_for(places, max(sizes), device)
        tier: Tier
        if device.type == "cuda" or not plan.offload.folder:
            tier = HostMemory(len(self._entries), buffer.shape[1], device)
        else:
            tier = ExpertFile(plan.offload.folder, len(self._entries), buffer.shape[1])
        self._tier, self._reader = tier, Reader(tier, buffer)
        self._needed = self._listed = self._hits = self._hosted = 0

    def put(self, ordinal: int, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """gate_up [M, H, D], down [D, H]."""
        self._reader.put(self._entries[ordinal, expert], (gate_up, down))

    def begin(self) -> None:
        """A step begins: read what its first layer is expected to need."""
        self._reader.restart()
        self._read_ahead(0, None)

    @property
    def foresees(self) -> bool:
        """Whether ``need`` must be told what was chosen."""
        return self._foreseen is not None

    def need(self, ordinal: int, rows: np.ndarray, chosen: np.ndarray) -> Cold:
        """A layer's tokens are known: rows [slots] of each expert of the device; with foresight, chosen [E] tokens of
        each expert anywhere. Reads what they need, then what the next layer is expected to; gives the places in the
        slots of what is to be taken, in order, and of what the host is to compute."""
        plan = self._layers[ordinal]
        slots, stays = plan.slots[self._rank], (plan.resident or ())[self._rank]
        few = plan.host_rows[self._rank] if plan.host_rows is not None else 0
        cold = cold_experts(rows, slots, stays, self._early, few)
        wanted = [self._entries[ordinal, slots[i]] for i in cold.read]
        early = [self._entries[ordinal, expert] for expert in self._early]
        self._reader.drop(sorted(set(early).difference(wanted)))
        self._reader.ask([entry for entry in wanted if entry not in early])
        self._needed += len(wanted)
        self._hosted += len(cold.host)
        self._listed += len(early)
        self._hits += len(set(early).intersection(wanted))
        self._read_ahead(ordinal + 1, chosen)
        return cold

    def _read_ahead(self, ordinal: int, chosen: np.ndarray | None) -> None:
        """The layer comes next, if there is one; chosen: of the layer before."""
        self._early = ()
        if ordinal == len(self._layers):
            return
        if self._foreseen is not None and chosen is not None:
            self._early = self._foreseen[ordinal - 1].ahead(chosen)
        else:
            self._early = (self._layers[ordinal].ahead or ())[self._rank]
        self._reader.ask([self._entries[ordinal, expert] for expert in self._early])

    def take(self, ordinal: int, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up [1, M, H, D] and down [1, D, H] of an expert that was needed; valid until it is given back."""
        return self._parts(ordinal, self._reader.take(self._entries[ordinal, expert]))

    def rests(self, ordinal: int, expert: int) -> tuple[Tensor, Tensor]:
        """The same in memory of the host, where it rests."""
        return self._parts(ordinal, self._tier.rests(self._entries[ordinal, expert]))

    def _parts(self, ordinal: int, stored: Tensor) -> tuple[Tensor, Tensor]:
        values = stored.view(self._dtype)
        wide, tall = self._shapes[ordinal]
        first, both = prod(wide), prod(wide) + prod(tall)
        return values[:first].view(1, *wide), values[first:both].view(1, *tall)

    def give_back(self, ordinal: int, expert: int) -> None:
        self._reader.give_back(self._entries[ordinal, expert])

    def needs(self) -> Needs:
        return Needs(self._needed, self._listed, self._hits, self._reader.vain, self._hosted)


def _foreseen(plan: Plan, rank: int) -> list[Foreseen] | None:
    """Of every layer but the first; None where a plan has lists to read ahead."""
    assert plan.offload is not None
    if plan.offload.foresight is None:
        return None
    found = []
    for j, layer in enumerate(plan.layers[1:], 1):
        moe = plan.model.moe_block(j - 1).moe
        assert moe is not None
        found.append(foreseen(plan.offload.foresight, j, layer.slots, layer.resident or (), moe.top_k, rank))
    return found

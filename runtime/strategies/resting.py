"""The experts of all ``offload`` layers that rest outside a device's memory, by layer and expert.

D model, M matrices into the FFN (2 gated, 1 plain), H FFN columns.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ...spec import Plan
from ..reader import Reader
from ..tiers import ExpertFile, HostMemory, Tier, places_for


class Needs(NamedTuple):
    """What a device read so far: experts that tokens needed, those of them that it had begun to read before it knew,
    and experts read that nobody needed."""

    needed: int
    ahead: int
    vain: int


class Resting:
    """Of one device of a plan. Raises MoeplanError where the tier has no room for them."""

    def __init__(self, plan: Plan, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        assert plan.offload is not None
        self._dtype, self._entries, self._shapes = (
            dtype,
            dict[tuple[int, int], int](),
            list[tuple[tuple[int, ...], ...]](),
        )
        self.early: list[list[int]] = []
        sizes = [1]
        for ordinal, layer in enumerate(plan.layers):
            block = plan.model.moe_block(ordinal)
            moe, hidden = block.moe, block.hidden_size
            assert moe is not None
            assert layer.resident is not None
            assert layer.ahead is not None
            stays = set(layer.resident[rank])
            for expert in layer.slots[rank]:
                if expert not in stays:
                    self._entries[ordinal, expert] = len(self._entries)
            self._shapes.append(((2 if moe.gated else 1, moe.ffn_size, hidden), (hidden, moe.ffn_size)))
            sizes.append(sum(map(prod, self._shapes[-1])) * dtype.itemsize)
            self.early.append([self._entries[ordinal, expert] for expert in layer.ahead[rank]])
        places = plan.offload.places[rank] if self._entries else 0
        room = places_for(places, max(sizes), device)
        tier: Tier
        if device.type == "cuda":
            tier = HostMemory(len(self._entries), room.shape[1], device)
        else:
            tier = ExpertFile(plan.offload.folder, len(self._entries), room.shape[1])
        self._reader = Reader(tier, room)
        self._needed = self._hits = 0

    def put(self, ordinal: int, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """gate_up [M, H, D], down [D, H]."""
        self._reader.put(self._entries[ordinal, expert], (gate_up, down))

    def begin(self) -> None:
        """A step begins: read what its first layer is expected to need."""
        self._reader.restart()
        self._reader.ask(self.early[0])

    def need(self, ordinal: int, experts: Sequence[int]) -> None:
        """The tokens of a layer need these, in the order in which they will be taken; the next layer's turn comes."""
        wanted = [self._entries[ordinal, expert] for expert in experts]
        early = set(self.early[ordinal])
        self._reader.drop(sorted(early.difference(wanted)))
        self._reader.ask([entry for entry in wanted if entry not in early])
        if ordinal + 1 < len(self.early):
            self._reader.ask(self.early[ordinal + 1])
        self._needed += len(wanted)
        self._hits += len(early.intersection(wanted))

    def take(self, ordinal: int, expert: int) -> tuple[Tensor, Tensor]:
        """gate_up [1, M, H, D] and down [1, D, H] of an expert that was needed; valid until it is given back."""
        values = self._reader.take(self._entries[ordinal, expert]).view(self._dtype)
        wide, tall = self._shapes[ordinal]
        first, both = prod(wide), prod(wide) + prod(tall)
        return values[:first].view(1, *wide), values[first:both].view(1, *tall)

    def give_back(self, ordinal: int, expert: int) -> None:
        self._reader.give_back(self._entries[ordinal, expert])

    def needs(self) -> Needs:
        return Needs(self._needed, self._hits, self._reader.vain)

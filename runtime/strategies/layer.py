"""What a strategy is given, and what it asks for."""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ...spec.model import Moe
from ...spec.operators import Part
from ..groups import Group, Levels
from ..kernels import expert_ffn
from .resting import Resting

Lap = Callable[[Part], None]
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A device's experts: x [T, D], ids [T, K] int among those held here, -1 for none, weights [T, K] f32 -> the
gate-weighted sums [T, D] of their outputs."""


def experts_of(gate_up: Tensor, down: Tensor, activation: str) -> Experts:
    """Those of moeplan's kernels; gate_up [E, M, H, D], down [E, D, H]."""

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return expert_ffn(x, gate_up, down, ids, weights, activation=activation)

    return experts


class Region:
    """One stretch of memory that the gathered layers take turns to fill: as large as the largest needs."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)
        self._elements = 0

    def reserve(self, *shapes: tuple[int, ...]) -> None:
        """Called for every layer before any layer uses the region."""
        self._elements = max(self._elements, sum(map(prod, shapes)))

    def views(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Consecutive tensors in the region; they overwrite what the previous layer had there."""
        if self._memory.numel() < self._elements:
            self._memory = self._memory.new_empty(self._elements)
        sizes = [prod(shape) for shape in shapes]
        return [flat.view(shape) for flat, shape in zip(self._memory[: sum(sizes)].split(sizes), shapes, strict=True)]


class LayerContext(NamedTuple):
    """The surroundings of one mixture-of-experts layer on one device."""

    rank: int
    hosts: list[int]  # number of each device's host
    moe: Moe
    hidden: int
    device: torch.device
    region: Region
    levels: Levels | None = None  # where a layer is hierarchical
    ordinal: int = 0  # among the mixture-of-experts layers
    resting: Resting | None = None  # where layers are offload
    group: Group = None  # of the plan's devices; None: all ranks


class Stored(NamedTuple):
    """The routed experts that a device has in memory for a layer, and the FFN columns [first, end) of each; those that
    it has on its disk."""

    experts: tuple[int, ...]
    columns: tuple[int, int]
    resting: tuple[int, ...] = ()

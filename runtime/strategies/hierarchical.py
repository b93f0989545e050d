"""Hierarchical expert parallelism: tokens travel to hosts first, then inside them to the devices of their experts.

T tokens, D model, E experts, K top-k, G devices, P phases of the copy table, R rows that arrive at a relay, N rows that
it passes on, L devices of its host, S slots of its host.

Experts are placed as for ``ep``. A token with experts on a host crosses to it once, however many of its devices hold
them, as one row to its relay there (``spec.levels``); the relay sends a copy to each of those devices. On the way back
it adds their partial rows up, so that one row for each token and host crosses. A row names its experts by their place
among all slots of the host, and for the second level among the slots of the device.

One exchange of counts among all devices, before any row, tells every device what both levels will bring it.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...spec.levels import across_groups, host_numbers, inside_groups, relays
from ...spec.plan import LayerPlan
from ..collectives import all_to_all, exchange_counts
from ..kernels import expert_ffn
from ..layout import Layout
from . import ep
from .layer import Lap, LayerContext, Stored
from .rows import fields, unpack

__all__ = ["Hierarchical", "Way", "add_up", "combine", "pack", "relay", "unpack", "way"]

combine = ep.combine


class Way(NamedTuple):
    """Where rows go and come from, seen from one device.

    serving: expert -> device, as in ``ep``; first: expert -> place of the relay in ``across``, and the expert's place
    among the slots of that host. local, slot: [S + 1] device of the own host, by local index, and place among its
    slots; the last entries (L, -1) are those of id -1, of experts on other hosts.
    across: [members] devices of the first exchange; through: [G] local index of the own host's relay of each device.
    """

    serving: ep.Serving
    first: ep.Serving
    local: Tensor
    slot: Tensor
    across: Tensor
    through: Tensor
    local_devices: int


def way(plan: LayerPlan, hosts: list[int], num_experts: int, rank: int, device: torch.device) -> Way:
    """The tables of ``rank``."""
    serving = ep.serving(plan, hosts, num_experts, rank, device)
    number, table = host_numbers(hosts), relays(hosts)
    across = next(group for group in across_groups(hosts) if rank in group)
    inside = next(group for group in inside_groups(hosts) if rank in group)
    held = np.array([len(experts) for experts in plan.slots])
    start = np.array([held[:g][number[:g] == number[g]].sum() for g in range(len(held))])
    place = np.zeros(len(held), np.int64)
    for g, relayed in enumerate(table[rank][number]):
        place[g] = across.index(relayed)
    own = held[list(inside)]
    local = np.append(np.repeat(np.arange(len(inside)), own), len(inside))
    slot = np.append(np.concatenate([np.arange(count) for count in own]), -1)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(device)

    first = ep.Serving(tensor(place)[serving.device], tensor(start)[serving.device] + serving.slot, len(across))
    through = np.searchsorted(inside, table[:, number[rank]])
    return Way(serving, first, tensor(local), tensor(slot), tensor(np.array(across)), tensor(through), len(inside))


def pack(x: Tensor, ids: Tensor, weights: Tensor, to: Way, phase: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """De-duplicated send buffer of the first level, and what to tell the others.

    x [T, D], ids [T, K] int64 experts, weights [T, K] f32, phase [T, 1]. Returns rows [rows sent, row bytes] ordered by
    relay, then token; the token of each row int64; counts [G, 2] int64 for each device: rows that it takes from here as
    a relay, and tokens of here that have experts on it.
    """
    rows, token, sent = ep.pack(x, ids, weights, to.first, phase)
    entry = ids if to.serving.device.dim() == 1 else (ids, phase)
    needed = torch.zeros((to.serving.devices, len(x)), dtype=torch.bool, device=x.device)
    needed.scatter_(0, to.serving.device[entry].t(), True)
    counts = torch.stack([torch.zeros_like(to.through), needed.sum(1)], dim=1)
    counts[to.across, 0] = sent
    return rows, token, counts


def relay(rows: Tensor, hidden: int, dtype: torch.dtype, top_k: int, to: Way) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of arrived rows [R, row bytes] for the devices of this host.

    Returns rows [N, row bytes] ordered by device, then as they arrived; which row each is a copy of [N] int64; rows for
    each device [L] int64.
    """
    place = fields(rows, hidden, dtype, top_k)[1].long()
    local, slot = to.local[place], to.slot[place]  # -1 is the last entry
    wanted = torch.zeros((to.local_devices + 1, len(rows)), dtype=torch.bool, device=rows.device)
    wanted = wanted.scatter_(0, local.t(), True)[: to.local_devices]
    target, row = wanted.nonzero(as_tuple=True)
    copies = rows.index_select(0, row)
    here = local.index_select(0, row) == target.unsqueeze(1)
    fields(copies, hidden, dtype, top_k)[1].copy_(torch.where(here, slot.index_select(0, row), -1))
    return copies, row, wanted.sum(1)


def add_up(returned: Tensor, row: Tensor, arrived: int) -> Tensor:
    """[R, D] sums of the partial rows [N, D] that came back for each arrived row [N]; summed in f32."""
    sums = torch.zeros((arrived, returned.shape[1]), dtype=torch.float32, device=returned.device)
    return sums.index_add_(0, row, returned.float()).to(returned.dtype)


class Hierarchical:
    """One layer; see ``strategies.Strategy``."""

    def __init__(self, plan: LayerPlan, context: LayerContext) -> None:
        c = context
        assert c.levels is not None
        self._levels = c.levels
        self._way = way(plan, c.hosts, c.moe.num_experts, c.rank, c.device)
        self._activation = c.moe.activation
        self.stored = Stored(experts=plan.slots[c.rank], columns=(0, c.moe.ffn_size))

    def prepare(self, gate_up: Tensor, down: Tensor) -> None:
        self._gate_up, self._down = gate_up, down

    def start(self) -> bool:
        """Nothing to fetch: the weights stay."""
        return False

    def _counts(self, counts: Tensor) -> tuple[list[int], list[int], list[int]]:
        """Rows that this device sends to, and receives from, each member of the first exchange, and receives from each
        device of its host in the second; counts: as ``pack`` gives them."""
        to, received = self._way, exchange_counts(counts)
        inside = received.new_zeros(to.local_devices).index_add_(0, to.through, received[:, 1])
        members = len(to.across)
        both = torch.cat([counts[to.across, 0], received[to.across, 0], inside]).tolist()
        return both[:members], both[members : 2 * members], both[2 * members :]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor, layout: Layout, lap: Lap) -> Tensor:
        hidden, dtype, top_k, levels = x.shape[1], x.dtype, ids.shape[1], self._levels
        rows, token, counts = pack(x, ids, weights, self._way, ep.phases(layout.first, len(x), x.device))
        sent, taken, inward = self._counts(counts)
        arrived = all_to_all(rows, sent, taken, levels.across)
        copies, row, passed = relay(arrived, hidden, dtype, top_k, self._way)
        outward = passed.tolist()
        partial = unpack(all_to_all(copies, outward, inward, levels.inside), hidden, dtype, top_k)
        lap("dispatch")
        y = expert_ffn(partial[0], self._gate_up, self._down, *partial[1:], activation=self._activation)
        lap("expert")
        y = add_up(all_to_all(y, inward, outward, levels.inside), row, len(arrived))
        y = combine(all_to_all(y, taken, sent, levels.across), token, residual)
        lap("combine")
        return y

"""Hierarchical expert parallelism: tokens travel to hosts first, then inside them to the devices of their experts.

T tokens, D model, E experts, K top-k, G devices, P phases of the copy table, R rows that arrive at a relay, N rows that
it passes on, L devices of its host, S slots of its host.

Experts are placed as for ``ep``. A token with experts on a host crosses to it once, however many of its devices hold
them, as one row to its relay there (``spec.levels``); the relay sends a copy to each of those devices. On the way back
it adds their partial rows up, so that one row for each token and host crosses. A row names its experts by their place
among all slots of the host, and for the second level among the slots of the device.

One exchange of counts among all devices, before any row, tells every device what both levels will bring it, in every
chunk. In chunks, all of them begin to cross at once; while one crosses, the one before is relayed inside the host and
the one before that is computed, in the plan's order (``spec.chunk_order``); the way back likewise.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...spec.chunk_order import calls
from ...spec.layout import even
from ...spec.levels import across_groups, host_numbers, inside_groups, relays
from ...spec.plan import LayerPlan
from ..collectives import Pending, all_to_all_start, exchange_counts
from ..groups import Group
from ..layout import Layout
from . import ep
from .layer import Experts, Lap, LayerContext, Stored, experts_of
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
    # The last entries are those of expert -1: no relay takes it, and its slot stays -1.
    place, start = np.full(len(held) + 1, len(across)), np.append(start, 0)
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
    needed = torch.zeros((to.serving.devices + 1, len(x)), dtype=torch.bool, device=x.device)
    needed = needed.scatter_(0, to.serving.device[entry].t(), True)[: to.serving.devices]
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
        self._activation, self._chunks, self._order = c.moe.activation, plan.chunks, plan.order
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
        chunks = self._begin(x, ids, weights, layout)
        lap("dispatch")
        for call, c in calls(len(chunks), self._order):
            match call:
                case "relay":
                    self._relay(chunks[c])
                    lap("dispatch")
                case "experts":
                    self._compute(chunks[c], lap)
                case "add":
                    self._add(chunks[c])
                    lap("combine")
        sums = []
        for chunk, part in zip(chunks, residual.split(even(len(x), self._chunks)), strict=True):
            sums.append(combine(chunk.come(), chunk.token, part))
        lap("combine")
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def _begin(self, x: Tensor, ids: Tensor, weights: Tensor, layout: Layout) -> list["_Chunk"]:
        """Send every token to the hosts of its experts; all chunks leave at once."""
        sizes, phase = even(len(x), self._chunks), ep.phases(layout.first, len(x), x.device)
        parts = zip(*(t.split(sizes) for t in (x, ids, weights, phase)), strict=True)
        packed = [pack(rows, chosen, gates, self._way, at) for rows, chosen, gates, at in parts]
        sent, taken, inward = self._counts(torch.stack([counts for _, _, counts in packed], dim=2))
        found = []
        for c, (rows, token, _) in enumerate(packed):
            chunk = _Chunk(x.shape[1], x.dtype, ids.shape[1], token, sent[c], taken[c], inward[c])
            chunk.go(rows, sent[c], taken[c], self._levels.across)
            found.append(chunk)
        return found

    def _counts(self, counts: Tensor) -> list[list[list[int]]]:
        """Of each chunk, rows that this device sends to, and receives from, each member of the first exchange, and
        receives from each device of its host in the second; counts: [G, 2, chunks], each as ``pack`` gives them."""
        to, received = self._way, exchange_counts(counts)
        inside = received.new_zeros(to.local_devices, counts.shape[2]).index_add_(0, to.through, received[:, 1])
        sizes = [len(to.across), len(to.across), to.local_devices]
        rows = torch.cat([counts[to.across, 0], received[to.across, 0], inside])
        return [part.t().tolist() for part in rows.cpu().split(sizes)]

    def _relay(self, chunk: "_Chunk") -> None:
        """Pass on what came from all hosts."""
        arrived = chunk.come()
        copies, chunk.row, passed = relay(arrived, chunk.hidden, chunk.dtype, chunk.top_k, self._way)
        chunk.arrived, chunk.outward = len(arrived), passed.tolist()
        chunk.go(copies, chunk.outward, chunk.inward, self._levels.inside)

    def _compute(self, chunk: "_Chunk", lap: Lap) -> None:
        """The experts here; partial rows go back to the relays."""
        x, ids, weights = unpack(chunk.come(), chunk.hidden, chunk.dtype, chunk.top_k)
        lap("dispatch")
        y = self._experts(x, ids, weights)
        lap("expert")
        chunk.go(y, chunk.inward, chunk.outward, self._levels.inside)

    def _add(self, chunk: "_Chunk") -> None:
        """Add up what came back for each row that was relayed; the sums go back to its host."""
        y = add_up(chunk.come(), chunk.row, chunk.arrived)
        chunk.go(y, chunk.taken, chunk.sent, self._levels.across)


@dataclass
class _Chunk:
    """One chunk's rows on their way.

    token: of each row sent. Rows to and from each member: sent, taken of the exchange across hosts; outward, inward of
    the one inside, on the way there. Once relayed: which of the ``arrived`` rows each copy is of. moving: what is under
    way.
    """

    hidden: int
    dtype: torch.dtype
    top_k: int
    token: Tensor
    sent: list[int]
    taken: list[int]
    inward: list[int]
    outward: list[int] = field(default_factory=list)
    arrived: int = 0
    row: Tensor = field(default_factory=lambda: torch.empty(0))
    moving: tuple[Tensor, Pending] | None = None

    def go(self, rows: Tensor, sent: list[int], received: list[int], group: Group) -> None:
        """Begin an exchange."""
        self.moving = all_to_all_start(rows, sent, received, group)

    def come(self) -> Tensor:
        """What the exchange under way brings."""
        assert self.moving is not None
        (rows, pending), self.moving = self.moving, None
        pending.wait()
        return rows

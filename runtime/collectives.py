"""Collectives over rows of unequal counts, also zero, for gloo and NCCL.

All-to-all goes through ``all_to_all_single``; all-gather goes point to point, each device sending its one buffer
straight into the others' memory: on gloo that takes half the time of ``dist.all_gather`` and of an all-to-all with
repeated sends, while the two ways tie for a real all-to-all. Empty messages are sent by nobody and awaited by nobody:
both ends know the counts.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import Group


class Pending:
    """Transfers under way; the buffers are kept alive until ``wait`` returns."""

    def __init__(self, works: list[Any], buffers: tuple[Tensor, ...]) -> None:
        self._works, self._buffers = works, buffers

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._buffers = [], ()


def all_to_all(send: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: Group = None) -> Tensor:
    """Send ``send_counts[g]`` consecutive rows to each member, receive ``recv_counts[g]`` from each, in rank order.

    send: [sum(send_counts), ...]; result: [sum(recv_counts), ...], same dtype.
    """
    if len(send_counts) == 1:
        return send
    received = send.new_empty((sum(recv_counts), *send.shape[1:]))
    dist.all_to_all_single(received, send.contiguous(), list(recv_counts), list(send_counts), group=group)
    return received


def all_to_all_start(
    send: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], group: Group = None
) -> tuple[Tensor, Pending]:
    """The same, begun: go on computing, and ``wait`` before the result is read."""
    if len(send_counts) == 1:
        return send, Pending([], ())
    send = send.contiguous()
    received = send.new_empty((sum(recv_counts), *send.shape[1:]))
    work = dist.all_to_all_single(received, send, list(recv_counts), list(send_counts), group=group, async_op=True)
    return received, Pending([work], (send, received))


def exchange_counts(send_counts: Tensor, group: Group = None) -> Tensor:
    """send_counts: [members, ...] int64, rows for each member; result: [members, ...] rows from each."""
    if len(send_counts) == 1:
        return send_counts
    received = torch.empty_like(send_counts)
    dist.all_to_all_single(received, send_counts, group=group)
    return received


def all_gather(own: Tensor, counts: Sequence[int], group: Group = None) -> Tensor:
    """own: [counts[me], ...]; result: [sum(counts), ...], members' rows in rank order."""
    gathered, pending = gather_start(own, counts, group)
    pending.wait()
    return gathered


def gather_start(own: Tensor, counts: Sequence[int], group: Group = None) -> tuple[Tensor, Pending]:
    """The same, begun: go on computing, and ``wait`` before the result is read."""
    if len(counts) == 1:
        return own, Pending([], ())
    gathered = own.new_empty((sum(counts), *own.shape[1:]))
    return gathered, all_gather_start(own, gathered.split(list(counts)), group)


def all_gather_start(own: Tensor, views: Sequence[Tensor], group: Group = None) -> Pending:
    """Begin to bring each member's ``own`` into ``views[member]`` of every member; go on computing, then ``wait``.

    The views are contiguous, and ``views[m]`` has the shape of member m's ``own``. This member's own rows are copied
    before the call returns.
    """
    size, me = len(views), dist.get_rank(group) if len(views) > 1 else 0
    own = own.contiguous()
    operations = []
    for distance in range(1, size):
        source, target = (me - distance) % size, (me + distance) % size
        if views[source].numel():
            operations.append(dist.P2POp(dist.irecv, views[source], group=group, group_peer=source))
        if own.numel():
            operations.append(dist.P2POp(dist.isend, own, group=group, group_peer=target))
    works = dist.batch_isend_irecv(operations) if operations else []
    if views[me].data_ptr() != own.data_ptr():
        views[me].copy_(own)
    return Pending(works, (own, *views))


def reduce_scatter(partial: Tensor, counts: Sequence[int], group: Group = None) -> Tensor:
    """Sum the members' [sum(counts), D] and keep this member's [counts[me], D]: dtype on the wire, f32 sum."""
    if len(counts) == 1:
        return partial
    mine = counts[dist.get_rank(group)]
    received = all_to_all(partial, counts, [mine] * len(counts), group)
    return received.view(len(counts), mine, *partial.shape[1:]).sum(0)  # accumulates in f32 for every dtype


def all_reduce(x: Tensor, group: Group = None) -> Tensor:
    """Sum over members, in place."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(x, group=group)
    return x

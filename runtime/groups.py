"""Process groups whose threads give way to the ones that compute.

gloo waits for its sockets in a thread of its own. Its peer's message wakes that thread while the computing thread sends
its own message and holds the connection's lock; woken, the thread goes before the sender, finds the lock taken (a
``try_lock``) and asks for the same event again and again, until a tick of the scheduler gives the core back to the one
that could release the lock: up to 5 ms for messages that take 0.2 ms, in most exchanges of ranks with one core each.

Under SCHED_BATCH a thread goes before nobody when it wakes, and has its full share of the core all the same. Two ranks
of a 2-core machine exchanged 1 KiB after 3 ms of work in 0.4 ms (median of 100; all-to-all and all-gather) where it
was 0.3 and 5.0 ms, in 0.4 and 0.5 ms on average where it was 1.7 and 4.7. Threads inherit the policy of
their creator.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch.distributed as dist

from ..spec import levels

Group = dist.ProcessGroup | None


@contextmanager
def giving_way() -> Iterator[None]:
    """Threads that this thread creates in the ``with`` block go before nobody when they wake.

    They stay as they are where the user chose another policy, and, with a warning, in a sandbox that allows none.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    changed = policy == os.SCHED_OTHER
    if changed:
        try:
            os.sched_setscheduler(0, os.SCHED_BATCH, parameters)
        except PermissionError:
            changed = False
            warnings.warn("SCHED_BATCH is refused here: small exchanges may take milliseconds longer", stacklevel=3)
    try:
        yield
    finally:
        if changed:
            os.sched_setscheduler(0, policy, parameters)


def open_group(ranks: Sequence[int]) -> Group:
    """A group of these ranks, of no use to others; every rank must call it, with the same ranks."""
    with giving_way() if dist.get_backend() == "gloo" else nullcontext():
        return dist.new_group(list(ranks))


def consecutive_group(size: int) -> Group:
    """The group of ``size`` consecutive ranks that this rank belongs to; every rank must call it.

    ``size`` divides the world. A group has connections of its own, also one of all ranks: what it sends does not queue
    behind a gather under way among all.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    groups = [open_group(range(first, first + size)) for first in range(0, world, size)]
    return groups[rank // size]


class Levels(NamedTuple):
    """The groups of both levels that this rank belongs to (``spec.levels``); None where it is alone in one."""

    across: Group
    inside: Group


def open_levels(hosts: Sequence[int]) -> Levels:
    """hosts: number of each rank's host. Every rank must call it."""
    return Levels(*(_own_group(groups) for groups in (levels.across_groups(hosts), levels.inside_groups(hosts))))


def _own_group(groups: levels.Groups) -> Group:
    rank = dist.get_rank()
    opened = {group: open_group(group) for group in groups if len(group) > 1}
    return next((handle for group, handle in opened.items() if rank in group), None)

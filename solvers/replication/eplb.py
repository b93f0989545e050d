"""EPLB's greedy balancer (deepseek-ai/EPLB), the baseline that serving engines use, written anew from its description.

    step 1  expert groups to hosts, as many on each: heaviest first, to the lightest not yet full      ``_pack``
    step 2  copies inside each host: one more for the expert whose copies carry most, until slots end ``_replicate``
    step 3  copies to the host's devices, as many on each: as in step 1                               ``_pack``

Copies take even shares, devices are equal. One host and one group is its global mode. Ties go to the lower number.
It knows neither speeds nor memory, and may put two copies of an expert on one device.
"""

# L layers, E experts, G devices, R slots, X hosts of all layers

import numpy as np
from numpy.typing import ArrayLike

from ..result import Infeasible
from ..slots import EMPTY, Slots


def eplb(load: ArrayLike, slots: int, groups: int, hosts: int, devices: int) -> Slots:
    """EPLB's placement of ``load`` [L, E] in ``slots`` slots on ``devices`` equal devices of ``hosts`` equal hosts.

    Hierarchical where ``groups`` is a multiple of ``hosts``; otherwise, as in EPLB, global: groups and hosts are
    ignored. ``slots`` counts all devices together, per layer.

    Two copies of an expert on one device serve no purpose, and ``Slots`` has no form for them: they become one copy
    with the summed share, and the second slot stays empty. Loads are unchanged by that.

    Raises ``Infeasible`` naming EPLB's rule where a count is not divisible.
    """
    loads = np.asarray(load, float)
    if loads.ndim != 2 or 0 in loads.shape or not np.isfinite(loads).all() or (loads < 0).any():
        raise ValueError(f"load must be finite, non-negative [layers, experts], got {list(loads.shape)}")
    layers, experts = loads.shape
    if min(slots, groups, hosts, devices) < 1:
        raise ValueError(f"need at least 1 of each, got {slots=}, {groups=}, {hosts=}, {devices=}")
    if groups % hosts:
        groups = hosts = 1
    _divisible("slots % devices == 0", slots, devices)
    _divisible("experts % groups == 0", experts, groups)
    _divisible("devices % hosts == 0", devices, hosts)
    if slots < experts:
        raise Infeasible(
            f"EPLB needs slots >= experts: {experts} experts in {slots} slots", unit="slots", missing=experts - slots
        )

    # Step 1: expert_at[l, i] is the expert at place i when hosts are written one after another
    group_size = experts // groups
    host_of, rank = _pack(loads.reshape(layers, groups, group_size).sum(2), hosts)
    group_at = np.empty((layers, groups), np.int64)
    np.put_along_axis(group_at, host_of * (groups // hosts) + rank, np.arange(groups)[None, :], 1)
    expert_at = (group_at[:, :, None] * group_size + np.arange(group_size)).reshape(layers * hosts, -1)

    # Step 2
    weight = np.take_along_axis(loads, expert_at.reshape(layers, experts), 1).reshape(expert_at.shape)
    copy_of, count = _replicate(weight, slots // hosts)
    carried = np.take_along_axis(weight / count, copy_of, 1)

    # Step 3
    device, rank = _pack(carried, devices // hosts)
    placed = np.empty(copy_of.shape, np.int64)
    expert = np.take_along_axis(expert_at, copy_of, 1)
    np.put_along_axis(placed, device * (slots // devices) + rank, expert, 1)
    return _merged(placed.reshape(layers, slots), np.full(devices, slots // devices))


def _divisible(rule: str, count: int, by: int) -> None:
    if count % by:
        name, _, divisor = rule.removesuffix(" == 0").partition(" % ")
        raise Infeasible(
            f"EPLB needs {rule}: got {count} {name} and {by} {divisor}", unit=name, missing=by - count % by
        )


def _pack(weight: np.ndarray, packs: int) -> tuple[np.ndarray, np.ndarray]:
    """Items [X, N] into packs of N / packs items: heaviest first, to the lightest pack that is not full.

    Returns (pack, place within the pack), [X, N] each.
    """
    rows, items = weight.shape
    size = items // packs
    pack, rank = np.empty((rows, items), np.int64), np.zeros((rows, items), np.int64)
    if size == 1:
        pack[:] = np.arange(items)
        return pack, rank
    row = np.arange(rows)
    carried, held = np.zeros((rows, packs)), np.zeros((rows, packs), np.int64)
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        chosen = np.where(held < size, carried, np.inf).argmin(axis=1)
        pack[row, item], rank[row, item] = chosen, held[row, chosen]
        carried[row, chosen] += weight[row, item]
        held[row, chosen] += 1
    return pack, rank


def _replicate(weight: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Copies for experts [X, N] in ``slots`` slots: the next one goes to the largest weight per copy.

    Returns (expert of each copy [X, slots], copies of each expert [X, N]).
    """
    rows, experts = weight.shape
    row = np.arange(rows)
    expert_of = np.tile(np.arange(slots), (rows, 1))
    count = np.ones((rows, experts), np.int64)
    for slot in range(experts, slots):
        busiest = (weight / count).argmax(axis=1)
        expert_of[:, slot] = busiest
        count[row, busiest] += 1
    return expert_of, count


def _merged(expert_of: np.ndarray, capacity: np.ndarray) -> Slots:
    """Even shares per copy, copies of an expert on one device put together; expert_of: [L, R], every slot taken."""
    layers, devices = len(expert_of), len(capacity)
    held = np.sort(expert_of.reshape(layers, devices, -1), axis=2)
    copies = np.stack([np.bincount(row) for row in expert_of])
    share = 1 / np.take_along_axis(copies, held.reshape(layers, -1), 1).reshape(held.shape)
    for i in range(held.shape[2] - 1, 0, -1):
        twice = held[:, :, i] == held[:, :, i - 1]
        share[:, :, i - 1] += np.where(twice, share[:, :, i], 0.0)
        share[:, :, i] = np.where(twice, 0.0, share[:, :, i])
        held[:, :, i] = np.where(twice, EMPTY, held[:, :, i])
    return Slots(held.reshape(layers, -1), share.reshape(layers, -1), capacity)

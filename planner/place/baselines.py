"""What a user would do without a solver: experts by number, or EPLB's greedy balance."""

# L layers, E experts, G devices

import numpy as np

from ...solvers.balance import greedy_balance, linear
from ...solvers.replication.eplb import eplb
from ...solvers.result import Infeasible
from ...solvers.slots import Slots
from .fleet import Fleet


def linear_slots(layers: int, experts: int, fleet: Fleet) -> Slots | None:
    """Experts by number in equal blocks, one copy each; None where a device has too few slots for its block."""
    device_of = np.tile(linear(experts, len(fleet.speed)), (layers, 1))
    if (np.bincount(device_of[0], minlength=len(fleet.speed)) > fleet.capacity).any():
        return None
    return Slots.from_device_of(device_of, fleet.capacity)


def eplb_slots(load: np.ndarray, slots: int, groups: int, fleet: Fleet) -> Slots | None:
    """EPLB's hierarchical placement of ``load`` [L, E], with equal devices and slots as it assumes.

    Without expert groups each host is a group of consecutive experts, as in EPLB's hierarchical mode; where hosts do
    not divide the experts it is global. None where its rules refuse the counts, or a device has too few slots for it.
    """
    found = _eplb(load, slots, groups, fleet)
    return found if isinstance(found, Slots) else None


def eplb_refuses(load: np.ndarray, slots: int, groups: int, fleet: Fleet) -> str:
    """Why ``eplb_slots`` is None, as text."""
    found = _eplb(load, slots, groups, fleet)
    return found if isinstance(found, str) else ""


def _eplb(load: np.ndarray, slots: int, groups: int, fleet: Fleet) -> Slots | str:
    """The placement, or why there is none."""
    hosts, devices = len(fleet.names), len(fleet.speed)
    groups = groups if groups > 1 else hosts
    if load.shape[1] % groups:
        groups = hosts = 1
    try:
        found = eplb(load, slots, groups, hosts, devices)
    except Infeasible as error:
        return str(error)
    held = slots // devices
    if (fleet.capacity < held).any():
        device = int(fleet.capacity.argmin())
        return f"EPLB gives every device {held} slots, and device {device} has {fleet.capacity[device]}"
    # EPLB's devices are numbered host by host.
    position = np.argsort(fleet.by_host, kind="stable")
    order = (position[:, None] * held + np.arange(held)).ravel()
    return widened(Slots(found.expert_of[:, order], found.share_of[:, order], found.capacity), fleet.capacity)


def greedy(load: np.ndarray, fleet: Fleet) -> np.ndarray:
    """[L, E] devices by longest processing time first, with speeds and capacities; load: [L, E]."""
    return greedy_balance(load, fleet.speed, fleet.capacity).assignment


def grouped_greedy(load: np.ndarray, fleet: Fleet, groups: int) -> np.ndarray:
    """[L, E] devices: groups of experts, heaviest first, to the host that ends earliest; then greedy inside hosts."""
    if groups == 1:
        return greedy(load, fleet)
    layers, experts = load.shape
    speed = np.bincount(fleet.hosts, fleet.speed)
    size, per_host = experts // groups, np.full(len(speed), groups // len(speed))
    by_group = load.reshape(layers, groups, size).sum(axis=2)
    host_of = greedy(by_group, Fleet(speed, per_host, np.arange(len(speed)), fleet.names))
    return inside_hosts(np.repeat(host_of, size, axis=1), load, fleet)


def inside_hosts(host_of: np.ndarray, load: np.ndarray, fleet: Fleet) -> np.ndarray:
    """[L, E] devices: greedy inside the host of each expert.

    host_of, load: [L, E], in every layer as many experts on a host.
    """
    placed = np.empty(load.shape, np.int64)
    for host in range(len(fleet.names)):
        devices = np.flatnonzero(fleet.hosts == host)
        inside = Fleet(fleet.speed[devices], fleet.capacity[devices], np.zeros(len(devices), int), ("",))
        here = np.nonzero(host_of == host)[1].reshape(len(load), -1)
        mine = np.take_along_axis(load, here, axis=1)
        np.put_along_axis(placed, here, devices[greedy(mine, inside)], axis=1)
    return placed


def widened(slots: Slots, capacity: np.ndarray) -> Slots:
    """The same copies on devices with at least as many slots."""
    lists = slots.to_lists()
    return Slots.from_lists([held for held, _ in lists], [taken for _, taken in lists], capacity)

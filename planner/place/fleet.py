"""The devices of a placement as the solvers want them, from counts or from a measured cluster."""

# G devices

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...spec.errors import InfeasibleError, MoeplanError
from ...spec.placement import PlacementDevice

ENGINES_RULE = "SGLang (physical experts % ep_size), TensorRT-LLM (num_slots % ep_size) and vllm-ascend"


@dataclass(frozen=True, eq=False)
class Fleet:
    """Arrays over devices: speed [G] relative, capacity [G] slots per layer, hosts [G] numbers, names by number."""

    speed: np.ndarray
    capacity: np.ndarray
    hosts: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def of(cls, devices: Sequence[PlacementDevice]) -> "Fleet":
        names = sorted({device.host for device in devices})
        return cls(
            np.array([device.speed for device in devices]),
            np.array([device.capacity for device in devices]),
            np.array([names.index(device.host) for device in devices]),
            tuple(names),
        )

    @property
    def by_host(self) -> np.ndarray:
        """[G] devices in the order of their hosts."""
        return np.argsort(self.hosts, kind="stable")

    @property
    def alike(self) -> bool:
        """Whether all devices have one speed and all hosts as many devices."""
        return len(set(self.speed.tolist())) == 1 and len(set(np.bincount(self.hosts).tolist())) == 1


def even_fleet(
    devices: int, hosts: int, slots: int, equal_slots: bool, experts: int = 1
) -> tuple[PlacementDevice, ...]:
    """``devices`` alike on ``hosts`` hosts, consecutive, with ``slots`` slots per layer in all for ``experts`` experts.

    Where the slots do not divide, the first devices have one more; ``equal_slots`` refuses that.
    """
    _check_counts(devices, hosts)
    if slots % devices and equal_slots:
        more, fewer = slots + devices - slots % devices, slots - slots % devices
        hint = f"use --slots {more}" + (f" (or {fewer})" if fewer >= experts and fewer else "")
        raise InfeasibleError(
            f"{slots} slots do not divide over {devices} devices, and equal slots are asked for, as {ENGINES_RULE} "
            f"demand: {hint}, or other --devices"
        )
    if slots < devices:
        raise InfeasibleError(
            f"{slots} slots on {devices} devices: every device needs one; use --slots {devices} or more, which copies "
            f"experts, or at most {slots} devices"
        )
    return uneven_fleet([len(part) for part in np.array_split(np.arange(slots), devices)], hosts)


def _check_counts(devices: int, hosts: int) -> None:
    if devices < 1 or not 1 <= hosts <= devices:
        raise MoeplanError(f"need at least 1 device and 1 to {devices} hosts, got {devices} and {hosts}")


def uneven_fleet(held: Sequence[int], hosts: int) -> tuple[PlacementDevice, ...]:
    """Devices of one speed on ``hosts`` hosts, consecutive, with so many slots per layer each."""
    devices = len(held)
    _check_counts(devices, hosts)
    of_host = np.repeat(np.arange(hosts), [len(part) for part in np.array_split(np.arange(devices), hosts)])
    width = len(str(hosts - 1))
    return tuple(
        PlacementDevice(host=f"host{host:0{width}d}", capacity=count) for host, count in zip(of_host, held, strict=True)
    )


def spread_slots(most: np.ndarray, slots: int) -> np.ndarray:
    """[G] at most ``most`` each, ``slots`` in all where they fit: one more at a time for the device with fewest."""
    capacity = np.zeros_like(most)
    for _ in range(min(slots, int(most.sum()))):
        capacity[np.where(capacity < most, capacity, slots + 1).argmin()] += 1
    return capacity


def check_groups(groups: int, experts: int, hosts: int) -> int:
    """Experts per group, adjacent ones; raises where the rules of group-limited routing are broken."""
    if experts % groups:
        raise MoeplanError(f"experts % groups == 0 is broken: {experts} experts in {groups} groups")
    if groups % hosts:
        raise MoeplanError(f"groups % hosts == 0 is broken: {groups} groups on {hosts} hosts")
    return experts // groups


def proportional(experts: int, capacity: np.ndarray) -> np.ndarray:
    """[X] experts per host in proportion to its slots, largest remainders first, never more than fit."""
    if capacity.sum() < experts:
        raise InfeasibleError(
            f"{experts} experts in {int(capacity.sum())} slots: {experts - int(capacity.sum())} slots missing"
        )
    exact = experts * capacity / capacity.sum()
    counts = np.floor(exact).astype(np.int64)
    for host in np.argsort(counts - exact, kind="stable")[: experts - counts.sum()]:
        counts[host] += 1
    return counts

"""A selection by classes: equal layers are one, equal devices are one, and options that are never better are gone."""

# L layers, O options, F regions, G devices; C classes of layers, D classes of devices

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from ..result import Infeasible

MAX_BYTES = 2**60  # sums of bytes stay exact in 64-bit integers


@dataclass(frozen=True)
class Problem:
    """The problem by classes of layers and devices, bytes as they came.

    cost [C, O], memory [C, O, D], shared [C, O, F, D], capacity [D], count [C] layers of each class, of_layer [L],
    devices [D] how many each class has, of_device [G].
    """

    cost: np.ndarray
    memory: np.ndarray
    shared: np.ndarray
    capacity: np.ndarray
    count: np.ndarray
    of_layer: np.ndarray
    devices: np.ndarray
    of_device: np.ndarray

    @property
    def available(self) -> np.ndarray:
        """[C, O] bool"""
        return np.isfinite(self.cost)

    def used(self, chosen: np.ndarray) -> np.ndarray:
        """[D] bytes that x = ``chosen`` [C, O] takes."""
        own = np.einsum("co,cog->g", chosen, self.memory)
        return own + np.where((chosen > 0)[:, :, None, None], self.shared, 0).max(axis=(0, 1)).sum(axis=0)

    def fits(self, chosen: np.ndarray) -> bool:
        return bool((self.used(chosen) <= self.capacity).all())

    def seconds(self, chosen: np.ndarray) -> float:
        picked = chosen > 0
        return float((chosen[picked] * self.cost[picked]).sum())

    def only(self, options: np.ndarray) -> "Problem":
        """Without the options that are not marked in ``options`` [C, O]."""
        return replace(
            self,
            cost=np.where(options, self.cost, np.inf),
            memory=np.where(options[..., None], self.memory, 0),
            shared=np.where(options[..., None, None], self.shared, 0),
        )

    def by_kind(self) -> "Problem":
        """Devices with equal bytes everywhere are one."""
        devices = len(self.capacity)
        bytes_of = [self.memory.reshape(-1, devices), self.shared.reshape(-1, devices), self.capacity[None]]
        columns = np.ascontiguousarray(np.concatenate(bytes_of).T)
        kinds: dict[bytes, int] = {}
        of_device = np.array([kinds.setdefault(column.tobytes(), len(kinds)) for column in columns])
        first = np.unique(of_device, return_index=True)[1]
        return replace(
            self,
            memory=np.ascontiguousarray(self.memory[..., first]),
            shared=np.ascontiguousarray(self.shared[..., first]),
            capacity=self.capacity[first],
            devices=np.bincount(of_device),
            of_device=of_device,
        )

    def undominated(self) -> "Problem":
        """Without options than which another of the same class is as fast and as small everywhere."""
        keep = self.available
        for o in range(self.cost.shape[1]):
            for p in range(self.cost.shape[1]):
                if o == p:
                    continue
                better = (self.cost[:, p] <= self.cost[:, o]) & keep[:, p]
                better &= (self.memory[:, p] <= self.memory[:, o]).all(1)
                better &= (self.shared[:, p] <= self.shared[:, o]).all((1, 2))
                keep[:, o] &= ~better
        return self.only(keep)


def checked(cost: ArrayLike, memory: ArrayLike, capacity: ArrayLike, shared: ArrayLike | None) -> Problem:
    """Validate, and make equal layers one. Raises ValueError, and Infeasible for a layer without options."""
    seconds = np.asarray(cost, dtype=float)
    if seconds.ndim != 2 or 0 in seconds.shape:
        raise ValueError(f"cost must be [layers, options], got {list(seconds.shape)}")
    if np.isnan(seconds).any() or (seconds < 0).any():
        raise ValueError("cost must hold seconds of at least 0 (inf where there is no such option)")
    limit = _bytes("capacity", capacity, (None,), negative=True)  # what is left may be less than nothing
    own = _bytes("memory", memory, (*seconds.shape, len(limit)))
    regions = np.zeros((*seconds.shape, 0, len(limit)), np.int64)
    if shared is not None:
        regions = _bytes("shared", shared, (*seconds.shape, None, len(limit)))
    without = np.flatnonzero(~np.isfinite(seconds).any(axis=1))
    if len(without):
        raise Infeasible(f"layer {without[0]} has no option", unit="options", missing=len(without))
    present = np.isfinite(seconds)
    own, regions = np.where(present[..., None], own, 0), np.where(present[..., None, None], regions, 0)
    layers = len(seconds)
    rows = [seconds[i].tobytes() + own[i].tobytes() + regions[i].tobytes() for i in range(layers)]
    classes = {row: c for c, row in enumerate(dict.fromkeys(rows))}
    of_layer = np.array([classes[row] for row in rows])
    first = np.array([rows.index(row) for row in classes])
    each = np.ones(len(limit), int), np.arange(len(limit))
    problem = Problem(seconds[first], own[first], regions[first], limit, np.bincount(of_layer), of_layer, *each)
    if float(own.sum()) + float(regions.sum()) > MAX_BYTES:
        raise ValueError(f"memory and shared add up to more than {MAX_BYTES} bytes")
    return problem


def _bytes(name: str, values: ArrayLike, shape: tuple[int | None, ...], *, negative: bool = False) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
        wanted = ["any" if n is None else n for n in shape]
        raise ValueError(f"{name} must have shape {wanted}, got {list(array.shape)}")
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be whole bytes (integers), got {array.dtype}")
    if not negative and (array < 0).any():
        raise ValueError(f"{name} must not be negative")
    return array.astype(np.int64)


def cheapest(problem: Problem) -> np.ndarray:
    """[C, O] the fastest option of every class."""
    chosen = np.zeros(problem.cost.shape, np.int64)
    chosen[np.arange(len(chosen)), problem.cost.argmin(axis=1)] = problem.count
    return chosen


def per_layer(problem: Problem, chosen: np.ndarray) -> tuple[int, ...]:
    """Layers of a class take its options in order: the first layers the first option."""
    queues = [np.repeat(np.arange(len(row)), row).tolist() for row in chosen]
    return tuple(queues[c].pop(0) for c in problem.of_layer)


def refuse_if_hopeless(problem: Problem) -> None:
    """Every layer takes at least its smallest option, for each device by itself."""
    big = np.int64(2**62)
    own = np.where(problem.available[:, :, None], problem.memory, big).min(axis=1)
    regions = np.where(problem.available[:, :, None, None], problem.shared, big).min(axis=1)
    least = problem.count @ own + regions.max(axis=0).sum(axis=0)
    missing = np.maximum(least - problem.capacity, 0)
    if missing.any():
        worst = int(missing.argmax())
        raise Infeasible(
            f"memory: device {worst} lacks at least {missing[worst]} bytes (every choice of options takes at least "
            f"{least[worst]}, it has {problem.capacity[worst]}); {np.count_nonzero(missing)} device(s) lack memory",
            unit="bytes",
            missing=int(missing.sum()),
            per_device=tuple(missing.tolist()),
        )

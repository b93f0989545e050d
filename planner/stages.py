"""What the devices do in a layer, stage by stage: written once by a strategy, read by the clock and by the graph.

Every device goes through the stages in order. ``compute``: a call that has the device's processors to itself.
``exchange``: collectives in groups of devices; each starts when the last of its own has come to it. ``start``: the
same, but beside the stages up to the ``wait`` of its number. What was started travels on a lane, one after another:
each begins when the one before has ended on all devices that share the lane, since two transfers over one link end no
earlier together than in turn. Each lane has links of its own: 0 those of the network (of a step in two levels, those
between hosts), 1 those inside hosts.
"""

# B layers that are costed together, G devices

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from ..spec.operators import Part
from .costs import Exchange


@dataclass(frozen=True)
class Partition:
    """Who waits for whom. of: [G] number of each device's group; width: members of each, where they are equally many
    consecutive devices, else 0."""

    of: np.ndarray
    width: int

    @classmethod
    def consecutive(cls, devices: int, width: int) -> "Partition":
        return cls(np.arange(devices) // width, width)

    @classmethod
    def apart(cls, groups: Sequence[Sequence[int]]) -> "Partition":
        """From their members, which together are all devices."""
        widths, order = {len(group) for group in groups}, np.concatenate(groups)
        if len(widths) == 1 and (order == np.arange(len(order))).all():
            return cls.consecutive(len(order), widths.pop())
        of = np.empty(len(order), int)
        for number, group in enumerate(groups):
            of[list(group)] = number
        return cls(of, 0)

    @property
    def alone(self) -> bool:
        """Whether nobody waits for another."""
        return self.width == 1

    @property
    def everyone(self) -> bool:
        return self.width == len(self.of)

    @cached_property
    def _order(self) -> tuple[np.ndarray, np.ndarray]:
        """Devices by group, and where each group begins among them."""
        order = np.argsort(self.of, kind="stable")
        return order, np.flatnonzero(np.diff(self.of[order], prepend=-1))

    def together(self, now: np.ndarray) -> np.ndarray:
        """[B, G] when all members of each device's group but one have come; -inf where it is alone."""
        if self.width == 1:
            return np.full(now.shape, -np.inf)
        if self.width:
            groups = now.reshape(len(now), -1, self.width)
            found = np.partition(groups, -2, axis=2)[:, :, -2:-1]
            return np.broadcast_to(found, groups.shape).reshape(now.shape)
        widths = np.bincount(self.of)
        order = np.lexsort((now, np.broadcast_to(self.of, now.shape)))
        first = np.cumsum(widths) - widths
        last_but_one = np.take_along_axis(now, order, 1)[:, np.maximum(first + widths - 2, 0)]
        return np.where(widths > 1, last_but_one, -np.inf)[:, self.of]

    def latest(self, now: np.ndarray) -> np.ndarray:
        """[B, G] the largest of [B, G] clocks in each device's group."""
        if self.everyone:
            return now.max(1, keepdims=True)
        if not self.width:
            order, first = self._order
            return np.maximum.reduceat(now[:, order], first, axis=1)[:, self.of]
        groups = now.reshape(len(now), -1, self.width)
        return np.broadcast_to(groups.max(2, keepdims=True), groups.shape).reshape(now.shape)


@dataclass(frozen=True)
class Stage:
    """seconds: [B or 1, G] of each device alone; exchanges: their groups together are all devices.

    level: [B or 1, G] of an ``exchange`` from when all members but one have come, at least ``seconds``, which are from
    when the last has come.
    busy: [B, G] fraction of its compute that a device loses to a started collective; number: which one. lane: what it
    travels on; sharing: who shares that, all of a group or of several.
    earlier: whether it is of the layer before the one that it is listed with.
    """

    kind: Literal["compute", "exchange", "start", "wait"]
    part: Part
    name: str
    seconds: np.ndarray
    exchanges: tuple[Exchange, ...] = ()
    busy: np.ndarray | None = None
    number: int = 0
    lane: int = 0
    sharing: Partition | None = None
    earlier: bool = False
    level: np.ndarray | None = None

    @cached_property
    def groups(self) -> Partition:
        """Those of its exchanges."""
        return Partition.apart([group for exchange in self.exchanges for group in exchange.waiting])

    @property
    def latency(self) -> np.ndarray:
        """[B, G] of a started collective; nothing where a device is alone in its group."""
        return np.minimum(self.exchanges[0].latency[:, None], self.seconds)

    def only(self, index: int) -> "Stage":
        """One layer of the batch by itself."""

        def row(values: np.ndarray) -> np.ndarray:
            return values[index : index + 1] if len(values) > 1 else values

        exchanges = tuple(e.only(index) for e in self.exchanges)
        busy = None if self.busy is None else row(self.busy)
        level = None if self.level is None else row(self.level)
        return replace(self, seconds=row(self.seconds), exchanges=exchanges, busy=busy, level=level)

    def one(self, index: int) -> np.ndarray:
        """[G] seconds of one layer of the batch."""
        return self.seconds[min(index, len(self.seconds) - 1)]


def compute(part: Part, name: str, seconds: np.ndarray) -> Stage:
    return Stage("compute", part, name, np.atleast_2d(seconds))


def exchange(part: Part, name: str, exchanges: Sequence[Exchange]) -> Stage:
    """A collective in each of the groups, which together are all devices, in order."""
    last, level = (np.concatenate([getattr(e, field) for e in exchanges], axis=1) for field in ("last", "seconds"))
    return Stage("exchange", part, name, last, tuple(exchanges), level=None if (last == level).all() else level)


def start(
    part: Part,
    name: str,
    exchange: Exchange,
    busy: np.ndarray,
    number: int = 0,
    lane: int = 0,
    apart: Sequence[Sequence[int]] | None = None,
) -> Stage:
    """A collective that goes on beside what follows. apart: devices that each have such a lane to themselves, which
    together are all devices; by default all share one."""
    devices = exchange.seconds.shape[1]
    sharing = Partition.consecutive(devices, devices) if apart is None else Partition.apart(apart)
    return Stage("start", part, name, exchange.seconds, (exchange,), busy, number, lane, sharing)


def wait(part: Part, devices: int, number: int = 0) -> Stage:
    return Stage("wait", part, "wait", np.zeros((1, devices)), number=number)

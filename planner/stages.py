"""What the devices do in a layer, stage by stage: written once by a strategy, read by the clock and by the graph.

Every device goes through the stages in order. ``compute``: a call that has the device's processors to itself.
``exchange``: a collective that its members wait for; it starts when the last has come to it. ``start``: a collective of
all devices that runs beside the stages up to the ``wait`` of its number. Of several that were started, each begins when
the one before has ended everywhere: messages between two devices are sent in their order.
"""

# B layers that are costed together, G devices

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..spec.operators import Part
from .costs import Exchange


@dataclass(frozen=True)
class Stage:
    """seconds: [B or 1, G] of each device alone; exchanges: one for each group, the groups in order, all of one size.

    busy: [B, G] fraction of its compute that a device loses to a started collective; number: which one.
    earlier: whether it is of the layer before the one that it is listed with.
    """

    kind: Literal["compute", "exchange", "start", "wait"]
    part: Part
    name: str
    seconds: np.ndarray
    exchanges: tuple[Exchange, ...] = ()
    busy: np.ndarray | None = None
    number: int = 0
    earlier: bool = False

    @property
    def width(self) -> int:
        """Members of each group."""
        return len(self.exchanges[0].group)

    @property
    def latency(self) -> np.ndarray:
        """[B, 1] of a collective over all devices."""
        return self.exchanges[0].latency[:, None]

    def only(self, index: int) -> "Stage":
        """One layer of the batch by itself."""

        def row(values: np.ndarray) -> np.ndarray:
            return values[index : index + 1] if len(values) > 1 else values

        exchanges = tuple(e.only(index) for e in self.exchanges)
        busy = None if self.busy is None else row(self.busy)
        return replace(self, seconds=row(self.seconds), exchanges=exchanges, busy=busy)

    def one(self, index: int) -> np.ndarray:
        """[G] seconds of one layer of the batch."""
        return self.seconds[min(index, len(self.seconds) - 1)]


def compute(part: Part, name: str, seconds: np.ndarray) -> Stage:
    return Stage("compute", part, name, np.atleast_2d(seconds))


def exchange(part: Part, name: str, exchanges: Sequence[Exchange]) -> Stage:
    """A collective in each of the groups, which together are all devices in order."""
    return Stage("exchange", part, name, np.concatenate([e.seconds for e in exchanges], axis=1), tuple(exchanges))


def start(part: Part, name: str, exchange: Exchange, busy: np.ndarray, number: int = 0) -> Stage:
    return Stage("start", part, name, exchange.seconds, (exchange,), busy, number)


def wait(part: Part, devices: int, number: int = 0) -> Stage:
    return Stage("wait", part, "wait", np.zeros((1, devices)), number=number)

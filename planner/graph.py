"""Builds the operations of a step, device by device in the order in which each executes them."""

from collections.abc import Sequence

import numpy as np

from ..spec.operators import Part
from .costs import Exchange
from .simulator import Operation, Timeline


class Graph:
    """Operations of all devices.

    Every device executes in order: what it does next waits for what it did last, in ``last``. A collective starts when
    all its members have come to it. The first operation of each device has no duration and marks its beginning.
    """

    def __init__(self, devices: int) -> None:
        self.operations: list[Operation] = []
        self.chains: list[list[int]] = [[] for _ in range(devices)]  # per device, what it executes in order
        self.layer = -1
        self.traffic = np.zeros((devices, devices))
        for device in range(devices):
            self._append(Operation("begin", "embed", device, -1, 0.0))

    @property
    def last(self) -> list[int]:
        return [chain[-1] for chain in self.chains]

    def compute(self, device: int, part: Part, name: str, seconds: float) -> None:
        """A call that has the device's processors to itself."""
        demands = {f"compute {device}": 1.0}
        self._append(Operation(name, part, device, self.layer, seconds, demands, (self.chains[device][-1],)))

    def exchange(self, part: Part, name: str, exchange: Exchange) -> None:
        """A collective that its members wait for."""
        for operation in self._transfers(part, name, exchange):
            self._append(operation)

    def start(self, part: Part, name: str, exchange: Exchange) -> list[int]:
        """A collective that runs beside what its members do next; the indices are for ``wait``."""
        first = len(self.operations)
        self.operations += self._transfers(part, name, exchange)
        return list(range(first, len(self.operations)))

    def wait(self, part: Part, pending: Sequence[int]) -> None:
        """Every device waits for its transfer of a started collective."""
        for i in pending:
            device = self.operations[i].device
            self._append(Operation("wait", part, device, self.layer, 0.0, {}, (self.chains[device][-1], i)))

    def parts(self, timeline: Timeline) -> dict[tuple[int, Part], float]:
        """Seconds of each (layer, part), mean over devices.

        A device's time between the end of one operation and the end of the next belongs to the next, so that waiting
        counts in the part that waits.
        """
        total: dict[tuple[int, Part], float] = {}
        for chain in self.chains:
            before = 0.0
            for i in chain:
                op = self.operations[i]
                key = op.layer, op.part
                total[key] = total.get(key, 0.0) + (timeline.end[i] - before) / len(self.chains)
                before = timeline.end[i]
        return {key: seconds for key, seconds in total.items() if seconds > 0}

    def _append(self, operation: Operation) -> None:
        self.chains[operation.device].append(len(self.operations))
        self.operations.append(operation)

    def _transfers(self, part: Part, name: str, exchange: Exchange) -> list[Operation]:
        group = exchange.group
        self.traffic[np.ix_(group, group)] += exchange.sizes
        arrived = tuple(self.chains[device][-1] for device in group)
        return [
            Operation(name, part, device, self.layer, seconds, demands, arrived, exchange.latency, transfer=True)
            for device, seconds, demands in zip(group, exchange.seconds, exchange.demands, strict=True)
        ]

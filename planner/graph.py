"""The operations of a step for the event simulator, device by device in the order in which each executes them."""

from collections.abc import Sequence

import numpy as np

from .costs import Costs
from .simulator import Operation, simulate
from .stages import Stage


class Graph:
    """Operations of ``devices``, at first one each that marks its beginning, so many seconds after 0.

    Every device executes in order: what it does next waits for what it did last. A collective starts when all its
    members have come to it, and no sooner after the last but one than they are late (``costs.Exchange``); members that
    are not among ``devices`` come at ``others``.
    """

    def __init__(self, costs: Costs, devices: Sequence[int], begin: Sequence[float], others: float = 0.0) -> None:
        self.costs, self.devices = costs, tuple(devices)
        self.operations: list[Operation] = []
        self.chains: dict[int, list[int]] = {device: [] for device in devices}  # what each executes in order
        self.layer = -1
        for device, seconds in zip(devices, begin, strict=True):
            self._append(Operation("begin", "embed", device, -1, seconds))
        self.others: tuple[int, ...] = ()
        if others > 0:
            self.others = (len(self.operations),)
            self.operations.append(Operation("others begin", "embed", -1, -1, others))
        self.pending: dict[int, list[int]] = {}  # started transfers, by number
        self.last: dict[int, tuple[int, ...]] = {}  # those that were started last, by lane

    def add(self, stages: Sequence[Stage], index: int, layer: int) -> None:
        """All operations of one layer of a batch, counted ``layer`` in the step."""
        self.last = {}
        for stage in stages:
            self.layer = layer - stage.earlier
            match stage.kind:
                case "compute":
                    seconds = stage.one(index)
                    for device in self.devices:
                        self._compute(stage, device, float(seconds[device]))
                case "exchange":
                    for operation in self._transfers(stage, index):
                        self._append(operation)
                case "start":
                    first = len(self.operations)
                    self.operations += self._transfers(stage, index, self.last.get(stage.lane, ()))
                    self.last[stage.lane] = tuple(range(first, len(self.operations)))
                    self.pending[stage.number] = list(self.last[stage.lane])
                case "wait":
                    for i in self.pending.pop(stage.number):
                        device = self.operations[i].device
                        after = (self.chains[device][-1], i)
                        self._append(Operation("wait", stage.part, device, self.layer, 0.0, {}, after))

    def _compute(self, stage: Stage, device: int, seconds: float) -> None:
        after = (self.chains[device][-1],)
        demands = {f"compute {device}": 1.0}
        self._append(Operation(stage.name, stage.part, device, self.layer, seconds, demands, after))

    def _transfers(self, stage: Stage, index: int, last: tuple[int, ...] = ()) -> list[Operation]:
        """One operation for each member; ``last``: what must have ended besides on devices that share the lane."""
        found = []
        for exchange in stage.exchanges:
            place = {device: a for a, device in enumerate(exchange.group)}
            at = min(index, len(exchange.seconds) - 1)
            for group in exchange.waiting:
                inside = [device for device in group if device in self.chains]
                if not inside:
                    continue
                demands = self.costs.demands(exchange, at, [place[device] for device in inside])
                arrived = tuple(self.chains[device][-1] for device in inside)
                arrived += tuple(i for i in last if _share(stage, self.operations[i].device, group[0]))
                arrived += self.others if len(inside) < len(group) else ()
                for device, shared in zip(inside, demands, strict=True):
                    wanted = _on_lane(shared, stage.lane)
                    whole = float(exchange.seconds[at, place[device]])
                    seconds = whole if stage.kind == "start" else float(exchange.last[at, place[device]])
                    latency = min(float(exchange.latency[at]), seconds)
                    found.append(
                        Operation(
                            stage.name,
                            stage.part,
                            device,
                            self.layer,
                            seconds,
                            wanted,
                            arrived,
                            latency,
                            transfer=True,
                            lane=stage.lane,
                            level=whole - seconds if len(inside) > 1 else 0.0,
                        )
                    )
        return found

    def _append(self, operation: Operation) -> None:
        self.chains[operation.device].append(len(self.operations))
        self.operations.append(operation)


def _share(stage: Stage, device: int, other: int) -> bool:
    """Whether what two devices start goes one after another."""
    assert stage.sharing is not None
    return bool(stage.sharing.of[device] == stage.sharing.of[other])


def _on_lane(demands: dict[str, float], lane: int) -> dict[str, float]:
    """The same on the links of a lane, which are its own; processors are for all lanes, and only the first crosses
    uplinks."""
    if not lane:
        return demands
    return {f"{name}, lane {lane}" if name.startswith(("out ", "in ")) else name: f for name, f in demands.items()}


def overlapped(
    costs: Costs, stages: Sequence[Stage], index: int, group: Sequence[int], begin: np.ndarray
) -> np.ndarray:
    """[stages, len(group)] when each stage ends on the devices of ``group``, which begin at ``begin`` [G]."""
    graph = Graph(costs, group, begin[list(group)].tolist(), float(begin.max()))
    graph.add(stages, index, 0)
    timeline = simulate(graph.operations)
    started = [stage.kind == "start" for stage in stages]
    ends = np.zeros((len(stages), len(group)))
    for member, device in enumerate(group):
        chain = [timeline.end[i] for i in graph.chains[device]]
        ends[~np.array(started), member] = chain[1:]
        ends[started, member] = begin[device]
    return ends

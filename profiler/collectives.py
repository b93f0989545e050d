"""Collectives of the runtime over the groups of devices that a plan may use."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..runtime.collectives import all_gather_start, all_reduce, all_to_all, reduce_scatter
from ..runtime.groups import open_group
from ..spec.curve import Curve
from ..spec.levels import across_groups, two_levels
from .grids import SIZES, Coordinates, Grid, Growth, Point, measured, steps
from .measure import Bench, StepTimer, Timing, measure, measure_exchange, summary, timer

KINDS = (
    ("all_to_all", "equal", 2.0),
    ("reduce_scatter", "equal", 2.0),
    ("all_reduce", "equal", 1.0),
    ("all_to_all", "skewed", 1.0),
    ("all_gather", "equal", 4.0),
)
"""Collective, traffic, and weight in dividing the time: gathered weights make the largest messages."""

HOT_SHARE = 0.75  # skewed traffic: this part of everything goes to the group's first device

Groups = tuple[tuple[int, ...], ...]
"""Disjoint groups of ranks that communicate at the same time, each within itself."""


class Family(NamedTuple):
    """Groups measured at the same time, and this rank's process group among them (None: it is in no group)."""

    groups: Groups
    own: tuple[int, ...] | None
    process_group: dist.ProcessGroup | None


def group_families(hosts: Sequence[str], degrees: Sequence[int]) -> list[Groups]:
    """All devices; each host's devices; groups across hosts where there are two levels (``spec.levels``); consecutive
    devices for each degree of tensor parallelism."""
    world = len(hosts)
    by_host = tuple(tuple(r for r, h in enumerate(hosts) if h == name) for name in dict.fromkeys(hosts))
    families: list[Groups] = [(tuple(range(world)),), tuple(g for g in by_host if len(g) > 1)]
    if two_levels(hosts):
        families.append(across_groups(hosts))
    families += [tuple(tuple(range(i, i + t)) for i in range(0, world, t)) for t in degrees if t > 1]
    return [groups for groups in dict.fromkeys(families) if groups and len(groups[0]) > 1]


def kinds_over(groups: Groups, hosts: Sequence[str]) -> Sequence[tuple[str, str, float]]:
    """What is measured over groups of a family: over those across hosts only what ``hierarchical`` does there."""
    if len(groups) > 1 and two_levels(hosts) and groups == across_groups(hosts):
        return [kind for kind in KINDS if kind[:2] == ("all_to_all", "equal")]
    return KINDS


def open_family(groups: Groups, rank: int, world: int) -> Family:
    """Create the process groups; every rank must call it with the same groups."""
    if groups == (tuple(range(world)),):
        return Family(groups, groups[0], None)
    handles = {group: open_group(group) for group in groups}
    own = next((group for group in groups if rank in group), None)
    return Family(groups, own, handles[own] if own else None)


class Measured:
    """One collective of a family being measured: its grid over message sizes, processor seconds of its points, and
    what they take from when the last device has come."""

    def __init__(
        self, family: Family, bench: Bench, name: str, traffic: str, dtype: torch.dtype, grid: Grid = SIZES
    ) -> None:
        self.family, self.bench, self.name, self.traffic, self.dtype = family, bench, name, traffic, dtype
        # A point may be measured twice: what belongs to each of its timings, one of which is kept.
        self.beside: dict[tuple[int, Timing], tuple[float, Timing]] = {}
        self.growth = Growth(grid, self.visit, bench.pace, self.fits)

    def visit(self, point: Coordinates) -> Point:
        """A rank without a group only takes part in the agreements."""
        family, bench = self.family, self.bench
        call: Callable[[], object] = idle
        begin, waited = time.perf_counter(), bench.patience.waited
        if family.own is not None:
            index, members = family.own.index(bench.rank), len(family.own)
            call = collective_call(
                self.name, self.traffic, point["bytes"], members, index, self.dtype, bench.device, family.process_group
            )
        if bench.device.type == "cuda":  # a GPU's own work loses nothing to this processor's threads
            timing = measure(timer([call], bench.device), bench.agree, bench.pace, together=True)
            busy, last = 0.0, timing
        else:
            run = StepTimer(call, bench.shared)
            timing, last = measure_exchange(run, bench.agree, bench.pace, bench.patience, self._least)
            busy = summary(run.busy[-timing.batches :]).median
        self.beside[point["bytes"], timing] = busy, last
        return measured(timing, time.perf_counter() - begin - (bench.patience.waited - waited), bench)

    def _least(self, values: Sequence[float]) -> list[float]:
        """Of all members of this rank's group; as they are where it is in none."""
        if self.family.own is None:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, op=dist.ReduceOp.MIN, group=self.family.process_group)
        return shared.tolist()

    def fits(self, point: Coordinates) -> bool:
        return 4 * point["bytes"] * max(map(len, self.family.groups)) < self.bench.available

    @property
    def disturbed(self) -> int:
        """Points that other programs never left alone for long enough."""
        return sum(not point.timing.clean for point in self.growth.points.values())

    def result(self) -> dict[str, Any]:
        """The fields of ``spec.cluster.measurement.MeasuredCollective``."""
        curve = self.growth.curve()
        sizes = [int(size) for size in curve.axes[0].values]
        busy, last = zip(*(self.beside[size, self.growth.points[size,].timing] for size in sizes), strict=True)
        return {
            "collective": self.name,
            "traffic": self.traffic,
            "group": self.family.own,
            "curve": curve.model_dump(mode="json"),
            "busy": Curve(axes=curve.axes, median=busy, spread=(0.0,) * len(busy)).model_dump(mode="json"),
            "last": Curve(
                axes=curve.axes, median=tuple(t.median for t in last), spread=tuple(t.spread for t in last)
            ).model_dump(mode="json"),
        }


def measure_collectives(
    family: Family, bench: Bench, dtype: torch.dtype, allowance: float, gathered: int = 0, message: int = 0
) -> list[Measured]:
    """Every collective over this rank's group, measured; noisy points may be measured again later.

    ``dtype`` matters to those that add up: bf16 sums cost a conversion. ``gathered``: bytes that a device contributes
    when a layer's experts are gathered, measured as well where time allows; 0 where this group gathers none.
    ``message``: the largest that a workload asks for; 0 without one.
    """
    curves, kinds = [], kinds_over(family.groups, bench.hosts)
    for i, (name, traffic, weight) in enumerate(kinds):
        start, waited = time.perf_counter(), bench.patience.waited
        grid = with_size(with_size(SIZES, message), gathered if name == "all_gather" else 0)
        part = weight / sum(w for *_, w in kinds[i:])
        curve = Measured(family, bench, name, traffic, dtype, grid)
        curve.growth.start()
        curve.growth.refine(allowance * part - curve.growth.spent)
        allowance -= bench.agree(time.perf_counter() - start) - (bench.patience.waited - waited)
        curves.append(curve)
    return curves


def with_size(grid: Grid, size: int) -> Grid:
    """The grid with one larger message, second in turn."""
    if size <= max(step.value for step in grid.steps):
        return grid
    first, second, *rest = grid.steps
    return grid._replace(steps=(first, second, *steps("bytes", size), *rest))


def collective_call(
    name: str,
    traffic: str,
    size: int,
    members: int,
    index: int,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> Callable[[], object]:
    """One call of a collective with ``size`` bytes in the sense of ``spec.cluster.CollectiveCurve``.

    Skewed all-to-all moves as many bytes in all, ``HOT_SHARE`` of them to the group's first member. All-gather fills
    memory that is there already, as gathered weights do: new pages for each call took a tenth of its time over a link
    of 1 Gbit/s, and half as long again in the first call.
    """
    rows = size // dtype.itemsize
    # Written, as ``torch.zeros`` would not: memory that was never written is no memory yet.
    own = torch.empty(rows, 1, dtype=dtype, device=device).zero_()
    everything = torch.empty(rows * members, 1, dtype=dtype, device=device).zero_()
    even = [rows] * members
    if name == "all_to_all" and traffic == "skewed":
        send = hot_counts(rows * members, members)
        received = [send[index]] * members
        return lambda: all_to_all(everything, send, received, group)
    if name == "all_to_all":
        return lambda: all_to_all(everything, even, even, group)
    if name == "all_gather":
        return lambda: all_gather_start(own, everything.split(even), group).wait()
    if name == "reduce_scatter":
        return lambda: reduce_scatter(everything, even, group)
    assert name == "all_reduce"
    return lambda: all_reduce(own, group)


def idle() -> None:
    """What a rank without a group runs."""


def hot_counts(rows: int, members: int) -> list[int]:
    """Rows for each member, at least ``HOT_SHARE`` of them for the first."""
    if members == 1:
        return [rows]
    cold = int(rows * (1 - HOT_SHARE)) // (members - 1)
    return [rows - cold * (members - 1)] + [cold] * (members - 1)

"""The measurement of a model's operators: in which order the time is spent.

First what every curve needs, those first that most of a step's time goes into, so that they reach far; then how far the
others do; then finer grids (see ``sizes``).
"""

import time
from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple

import torch

from ..runtime.calls import operator_call
from ..spec.cluster import OperatorCurve
from ..spec.errors import MoeplanError
from ..spec.workload import Workload
from .grids import Coordinates, Growth, Point, measured, repair
from .measure import Bench, ColdTimer, Timing, measure, timer
from .tasks import EXCHANGES, LEVELS, OFFLOAD, Task

TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SHARES = {
    "expert_ffn": 8.0,
    "attention_prefill": 4.0,
    "attention_decode": 3.0,
    "mixer_prefill": 4.0,
    "mixer_decode": 3.0,
    "head": 1.5,
} | dict.fromkeys((*EXCHANGES, *OFFLOAD, *LEVELS, "coherent_cache", "by_batch"), 0.25)
"""Weights of the operators in dividing the time beyond what they need; others have 1."""
FINER = 0.3  # of the time that is left is kept for noisy points and finer grids


def growth(task: Task, bench: Bench, workloads: Sequence[Workload] = ()) -> Growth:
    """The task's grid, ready to be measured. Raises MoeplanError where not even its first point fits into memory."""

    def call(at: Coordinates) -> Callable[[], None]:
        return operator_call(
            task.operator,
            task.model,
            task.block,
            TORCH_DTYPES[task.dtype],
            bench.device,
            devices=task.devices,
            tensor=task.tensor,
            hosts=task.hosts,
            **at,
        )

    def timed(calls: Sequence[Callable[[], None]], between: int) -> Timing:
        if bench.device.type == "cuda":
            return measure(timer(calls, bench.device, bench.clock), bench.agree, bench.pace)
        run = ColdTimer(calls, between, bench.clock)
        run(1)
        return measure(run, bench.agree, bench.pace, other=bench.agree(run.outside))

    def visit(at: Coordinates) -> Point:
        begin = time.perf_counter()
        calls = [call(at) for _ in range(task.copies(at))]
        begin += compiled(calls[0], bench.device)
        timing = timed(calls, task.between(at))
        return measured(timing, time.perf_counter() - begin, bench)

    def fits(at: Coordinates) -> bool:
        return task.memory_bytes(at) * task.copies(at) < bench.available // 2

    grid = task.grid_for(workloads)
    need = task.memory_bytes(grid.start) * task.copies(grid.start)
    if not fits(grid.start):
        raise MoeplanError(
            f"measuring {task.operator} of {task.model.name} ({task.dtype}) takes about {need >> 20} MiB on each "
            f"device, {bench.available >> 21} MiB may be used: profile with fewer ranks per host"
        )
    return Growth(grid, visit, bench.pace, fits, task.work)


def compiled(call: Callable[[], None], device: torch.device) -> float:
    """Seconds of a first call on a GPU, whose kernels are compiled and tuned then: no timing, and not those of the
    points to come. 0.0 on a processor, where nothing is called."""
    if device.type != "cuda":
        return 0.0
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begin


class MeasuredOperators(NamedTuple):
    """``lacking``: sizes of workloads that were too large, as text."""

    curves: list[OperatorCurve]
    lacking: list[str]


def measure_operators(
    work: Sequence[Task],
    bench: Bench,
    left: Callable[[], float],
    show: Callable[[str], None],
    others: Sequence[Growth] = (),
    late: float = 0.0,
    workloads: Sequence[Workload] = (),
    most: float = inf,
) -> MeasuredOperators:
    """All curves: first what each one and the ``workloads`` need, but for theirs that take more than ``most`` seconds;
    then, in the seconds that are ``left`` (agreed), what comes early, and finer grids.

    In between and at the end, there up to ``late`` seconds more, the noisy points are measured again, those of
    ``others`` (the collectives') among them.
    """
    growths = [growth(task, bench, workloads) for task in work]
    order = first_those_that_matter(work)
    for i, index in enumerate(order):
        task = work[index]
        show(f"{task.model.name} {task.dtype} {task.operator}")
        growths[index].start(left() * part([work[other].operator for other in order[i:]]), most)
    show("longer prompts, more tokens")
    reach(work, growths, left)
    every = [*others, *growths]
    half = left() / 2
    repair(every, lambda: left() < half, bench.patience.wait)
    for i, (task, grid) in enumerate(zip(work, growths, strict=True)):
        show(f"{task.model.name} {task.dtype} {task.operator}, finer")
        grid.refine(left() * part([t.operator for t in work[i:]]))
    repair(every, lambda: left() < -late, bench.patience.wait)
    curves = [
        OperatorCurve(operator=task.operator, shape=task.shape, dtype=task.dtype, curve=grid.curve())
        for task, grid in zip(work, growths, strict=True)
    ]
    lacking = [
        f"{task.operator} of {task.model.name} at {step.axis} {step.value:,}"
        for task, grid in zip(work, growths, strict=True)
        for step in grid.lacking
    ]
    return MeasuredOperators(curves, lacking)


def first_those_that_matter(work: Sequence[Task]) -> list[int]:
    """Positions by weight, the largest first; dtypes stay together, as in ``work``."""
    dtypes = list(dict.fromkeys(task.dtype for task in work))
    return sorted(range(len(work)), key=lambda i: (dtypes.index(work[i].dtype), -SHARES.get(work[i].operator, 1.0)))


def reach(work: Sequence[Task], growths: Sequence[Growth], left: Callable[[], float]) -> None:
    """Take early steps while any fits into its operator's part of the time, but for ``FINER`` of what is left."""
    kept = FINER * left()
    while True:
        among = [(task.operator, grid) for task, grid in zip(work, growths, strict=True) if grid.early]
        taken = 0
        for i, (_, grid) in enumerate(among):
            taken += grid.refine((left() - kept) * part([name for name, _ in among[i:]]), early=True)
        if not taken:
            return


def part(operators: Sequence[str]) -> float:
    """Of the time for all of these the first one's."""
    weights = [SHARES.get(name, 1.0) for name in operators]
    return weights[0] / sum(weights)

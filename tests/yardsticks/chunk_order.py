"""The best order of a layer's chunks on streams that work at once, by CP-SAT (FSMoE's schedule, arXiv 2501.10714).

The steps of a chunk follow each other, each on one stream; intervals of one stream do not overlap; nothing else is
fixed. Minimise the end of the last.
"""

from collections.abc import Callable, Iterator, Sequence

from ortools.sat.python import cp_model

from moeplan.spec.chunk_order import Call

LEVELS = ("across", "device", "inside", "device", "inside", "device", "across")
"""Streams of a chunk in two levels: there, relay, there, experts, back, add, back."""


def best_makespan(*steps: Sequence[int], streams: Sequence[str] = ("network", "device", "network")) -> int:
    """In the unit of the given durations, of each step those of all chunks; proven."""
    model, horizon = cp_model.CpModel(), sum(map(sum, steps))
    end = model.new_int_var(0, horizon, "end")
    intervals: dict[str, list[cp_model.IntervalVar]] = {stream: [] for stream in streams}
    for c, chunk in enumerate(zip(*steps, strict=True)):
        before = None
        for s, (stream, seconds) in enumerate(zip(streams, chunk, strict=True)):
            start = model.new_int_var(0, horizon, f"{s} of {c}")
            intervals[stream].append(model.new_fixed_size_interval_var(start, seconds, f"{s} of {c}"))
            if before is not None:
                model.add(start >= before)
            before = start + seconds
        assert before is not None
        model.add(end >= before)
    for own in intervals.values():
        model.add_no_overlap(own)
    model.minimize(end)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    assert solver.solve(model) == cp_model.OPTIMAL
    return round(solver.objective_value)


def played(calls: Sequence[tuple[Call, int]], durations: Callable[[int], Sequence[float]]) -> float:
    """The end of the last way back, where devices that are alike make these calls in this order, and what travels goes
    in the order in which it was started; durations: of a chunk, those of ``LEVELS``."""
    chunks = len(calls) // 3
    arrives, now, inside, across = [0.0] * chunks, 0.0, 0.0, 0.0
    for c in range(chunks):
        across += durations(c)[0]
        arrives[c] = across
    for call, c in calls:
        at = 1 + 2 * ("relay", "experts", "add").index(call)
        called, travels = durations(c)[at : at + 2]
        now = max(now, arrives[c]) + called
        if call == "add":
            across = max(across, now) + travels
        else:
            inside = arrives[c] = max(inside, now) + travels
    return across


def every_order(chunks: int) -> Iterator[tuple[tuple[Call, int], ...]]:
    """Of the calls of chunks that are alike, which are then taken by number."""

    def follow(done: tuple[int, ...]) -> Iterator[tuple[tuple[Call, int], ...]]:
        if done == (chunks,) * 3:
            yield ()
        names: tuple[Call, ...] = ("relay", "experts", "add")
        for i, name in enumerate(names):
            if done[i] < (chunks if i == 0 else done[i - 1]):
                more = (*done[:i], done[i] + 1, *done[i + 1 :])
                for rest in follow(more):
                    yield ((name, done[i]), *rest)

    yield from follow((0, 0, 0))

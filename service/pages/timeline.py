"""What the devices did, and what was predicted, as one file that ui.perfetto.dev opens (Chrome's JSON trace format)."""

import json
from collections.abc import Iterator, Mapping, Sequence

from ...planner.simulator import Timeline
from ...spec.report import Lap

Event = dict[str, object]


def perfetto(measured: Sequence[Lap], predicted: Timeline | None = None) -> str:
    """One process for each device as it ran, with one track, and one as predicted, with calls and transfers apart."""
    events = [*_measured(measured), *(_predicted(predicted) if predicted else ())]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _measured(laps: Sequence[Lap]) -> Iterator[Event]:
    for device in sorted({lap.device for lap in laps}):
        yield _name("process_name", 2 * device, 0, f"device {device}, measured")
        yield _name("thread_name", 2 * device, 0, "as it ran")
    for lap in laps:
        if lap.end > lap.begin:
            yield _slice(lap.part, lap.part, 2 * lap.device, 0, lap.begin, lap.end, {"layer": lap.layer})


def _predicted(timeline: Timeline) -> Iterator[Event]:
    for device in sorted({op.device for op in timeline.operations}):
        yield _name("process_name", 2 * device + 1, 0, f"device {device}, predicted")
        for track, name in enumerate(("compute", "transfer")):
            yield _name("thread_name", 2 * device + 1, track, name)
    for op, start, end in zip(timeline.operations, timeline.start, timeline.end, strict=True):
        if end > start:
            more = {"layer": op.layer, "seconds alone": op.seconds}
            yield _slice(op.name, op.part, 2 * op.device + 1, int(op.transfer), start, end, more)


def _name(what: str, process: int, track: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": process, "tid": track, "args": {"name": name}}


def _slice(
    name: str, part: str, process: int, track: int, begin: float, end: float, more: Mapping[str, object]
) -> Event:
    """Times in microseconds, as the format wants them."""
    where = {"ph": "X", "name": name, "cat": part, "pid": process, "tid": track}
    return where | {"ts": begin * 1e6, "dur": (end - begin) * 1e6, "args": dict(more)}

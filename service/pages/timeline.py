"""What the devices did, and what was predicted, as one file that ui.perfetto.dev opens (Chrome's JSON trace format)."""

import json
from collections.abc import Iterator, Mapping, Sequence

from ...planner.simulator import Timeline
from ...spec.report import Lap

Event = dict[str, object]

TRACKS = ("compute", "transfer", "transfer inside hosts")
"""The last where a device transfers on two lanes at the same time (``planner.stages``)."""


def perfetto(measured: Sequence[Lap], predicted: Timeline | None = None) -> str:
    """One process for each device as it ran, with one track, and one as predicted, with calls and transfers apart, and
    those inside hosts that run beside those between them."""
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
    lanes = max((op.lane for op in timeline.operations), default=0) + 1
    for device in sorted({op.device for op in timeline.operations}):
        yield _name("process_name", 2 * device + 1, 0, f"device {device}, predicted")
        for track, name in enumerate(TRACKS[: 1 + lanes]):
            yield _name("thread_name", 2 * device + 1, track, name)
    for op, start, end in zip(timeline.operations, timeline.start, timeline.end, strict=True):
        if end > start:
            more = {"layer": op.layer, "seconds alone": op.seconds}
            track = 1 + op.lane if op.transfer else 0
            yield _slice(op.name, op.part, 2 * op.device + 1, track, start, end, more)


def _name(what: str, process: int, track: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": process, "tid": track, "args": {"name": name}}


def _slice(
    name: str, part: str, process: int, track: int, begin: float, end: float, more: Mapping[str, object]
) -> Event:
    """Times in microseconds, as the format wants them."""
    where = {"ph": "X", "name": name, "cat": part, "pid": process, "tid": track}
    return where | {"ts": begin * 1e6, "dur": (end - begin) * 1e6, "args": dict(more)}

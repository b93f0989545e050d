"""Documents for pictures: a placement with its trace, a plan with its cluster and a report that fits it."""

from functools import cache
from pathlib import Path

import numpy as np

from moeplan.planner.place import explain as why
from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.spec import Cluster, Plan, Report, Workload
from moeplan.spec.placement import Placement, Scores, TraceSource
from moeplan.spec.report import Comparison, Lap, PartComparison
from moeplan.spec.trace import Trace
from moeplan.tests.explained import random_placement, random_trace
from moeplan.tests.synthetic import cluster, tiny_model

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>%{x}\u202e\x1b[31m$x$"


def placed(seed: int, trace: Trace, devices: int = 4, hosts: int = 2, copies: int = 0) -> Placement:
    """A random placement of the trace's shape, fitted on its first half, with scores."""
    placement = random_placement(seed, trace.layers, trace.num_experts, devices, hosts, copies)
    source = TraceSource(path="trace.npz", digest=trace.digest(), fit=(0.0, 0.5), tokens=trace.tokens // 2)
    parts = [trace.part(0, 0.5), trace.part(0.5, 1)]
    fit, rest = (why.measure(placement, part) for part in parts)
    scores = {name: Scores(fit=fit, held_out=rest) for name in ("placement", "linear", "eplb")}
    return placement.model_copy(update={"trace": source, "scores": scores})


@cache
def recorded() -> Trace:
    return random_trace(3, 5, 12, tokens=300)


@cache
def planned() -> tuple[Plan, Cluster]:
    """Four devices of two speeds on two hosts."""
    model = tiny_model(layers=3)
    machines = cluster(model, ((1.0, 1.0), (0.5, 0.5)))
    return solve(model, machines, Workload.from_text("decode:16@64"), time_limit=60), machines


def reported(plan: Plan, machines: Cluster) -> Report:
    """As if everything had taken a tenth longer than predicted."""
    rows = [
        PartComparison(layer=entry.layer, part=part, predicted=seconds, measured=1.1 * seconds, spread=0.05)
        for entry in plan.predicted.layers
        for part, seconds in entry.parts.items()
    ]
    line = Step.of(plan, machines, None).timeline(plan.layers)
    laps = [
        Lap(device=op.device, layer=op.layer, part=op.part, begin=1.1 * begin, end=1.1 * end)
        for op, begin, end in zip(line.operations, line.start, line.end, strict=True)
    ]
    step = plan.predicted.step_seconds
    return Report(
        plan=plan.digest(),
        model=plan.model.name,
        workload=str(plan.workload),
        step=Comparison(predicted=step, measured=1.1 * step, spread=0.05),
        repetitions=7,
        parts=tuple(rows),
        memory=tuple(memory.total for memory in plan.predicted.memory),
        check=None,
        tolerance=0.5,
        passed=True,
        environment={},
        timeline=tuple(laps),
    )


def written(folder: Path) -> dict[str, Path]:
    """All of them as files, the placement's names hostile."""
    trace = recorded()
    trace.write(folder / "trace.npz")
    old = placed(1, trace)
    devices = tuple(device.model_copy(update={"host": HOSTILE + device.host}) for device in old.devices)
    hostile = {"model": HOSTILE, "devices": devices, "notes": (HOSTILE,)}
    new = placed(2, trace).model_copy(update=hostile)
    plan, machines = planned()
    documents = {"old": old, "place": new, "plan": plan, "cluster": machines, "report": reported(plan, machines)}
    paths = {name: document.write(folder / f"{name}.json") for name, document in documents.items()}
    return paths | {"trace": folder / "trace.npz"}


def by_hand(placement: Placement, trace: Trace) -> np.ndarray:
    """[from, to] devices: moves of first choices, counted one by one."""
    where = [{e: g for g, held in enumerate(layer.slots) for e in held} for layer in placement.layers]
    moves = np.zeros((len(placement.devices),) * 2)
    for token in trace.expert_ids[:, :, 0]:
        for layer in range(trace.layers - 1):
            moves[where[layer][int(token[layer])], where[layer + 1][int(token[layer + 1])]] += 1
    return moves

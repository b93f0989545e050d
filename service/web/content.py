"""What a document says to people, as sections of texts, tables and figures; reports and the page show the same."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...planner.place.compare import MEASURES, compare
from ...planner.place.explain import divide, over_ideal
from ...planner.simulator import Timeline
from ...planner.units import bytes_text
from ...spec.cluster import Cluster
from ...spec.placement import Placement
from ...spec.plan import Plan
from ...spec.report import Report
from ...spec.trace import Trace
from ..pages.placement import scores_table
from ..pages.placement import verdict as placement_verdict
from ..pages.plan import candidates_table, memory_table
from ..pages.plan import verdict as plan_verdict
from ..pages.report import machine_notes, report_table
from ..pages.report import verdict as report_verdict
from .figures.crossings import crossings_figure, traffic_figure
from .figures.diff import loads_figure, moved_figure
from .figures.figure import Figure, readable
from .figures.front import PrintedFront, front_figure
from .figures.heat_map import experts_figure
from .figures.load import load_figure
from .figures.parts import compared_figure, predicted_figure
from .figures.timeline import timeline_figure
from .figures.topology import topology_figure
from .tables import Table, from_rich


@dataclass(frozen=True)
class Section:
    """verdict: whether the first text stands out."""

    name: str
    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = field(default_factory=tuple)
    verdict: bool = False


def placement_sections(
    placement: Placement, trace: Trace | None, cluster: Cluster | None = None, front: PrintedFront | None = None
) -> list[Section]:
    """A placement: how good and how sure, where it is hot, what moves. trace: the routing that it is shown on."""
    result = Section(
        "result",
        "Result",
        [placement_verdict(placement), *map(readable_note, placement.notes)],
        [from_rich(scores_table(placement))],
        verdict=True,
    )
    figures: list[Figure] = []
    known: list[str] = []
    counts = over = None
    if trace is None:
        known.append("Without the trace, loads and moves of tokens are not known.")
    else:
        fit, rest, notes = divide(trace, {"the placement": placement})
        parts = {name: part for name, part in (("fitted part", fit), ("held-out part", rest)) if part is not None}
        loads = {name: over_ideal(placement, part.expert_counts) for name, part in parts.items()}
        figures.append(load_figure(placement, loads))
        first = next(iter(parts.values()))
        counts, over = first.expert_counts, loads[next(iter(loads))]
        crossing = crossings_figure(placement, next(reversed(parts.values())))
        if crossing is not None:
            figures.append(crossing)
        elif not placement.single_copy:
            known.append("Some experts have several copies, and a token may meet any of them: moves are not counted.")
        known += [readable_note(note) for note in notes]
    figures.insert(min(1, len(figures)), experts_figure(placement, counts, over))
    sections = [result, Section("where", "Where the experts are", known, figures=figures)]
    if front is not None:
        sections.append(Section("front", "What balance buys", figures=[front_figure(front)]))
    if cluster is not None:
        sections.append(Section("cluster", "The cluster", figures=[topology_figure(cluster)]))
    return sections


def plan_sections(
    plan: Plan, report: Report | None = None, cluster: Cluster | None = None, predicted: Timeline | None = None
) -> list[Section]:
    """A plan: what it will cost and how sure that is; with a report, what it did cost.

    predicted: the plan's step, simulated, which takes the cluster that it was made for.
    """
    sections = [
        Section(
            "result",
            "Plan",
            [plan_verdict(plan).plain, *map(readable_note, plan.notes)],
            [from_rich(candidates_table(plan))],
            verdict=True,
        )
    ]
    if report is not None:
        texts = [report_verdict(report), *map(readable_note, (*report.notes, *machine_notes(report)))]
        sections.append(
            Section(
                "measured",
                "Predicted and measured",
                texts,
                [from_rich(report_table(report))],
                [compared_figure(report)],
            )
        )
    steps = [predicted_figure(plan)]
    if (timeline := timeline_figure(report.timeline if report else (), predicted)) is not None:
        steps.append(timeline)
    if (traffic := traffic_figure(plan)) is not None:
        steps.append(traffic)
    sections.append(Section("step", "One step", figures=steps))
    sections.append(Section("memory", "Memory", tables=[from_rich(memory_table(plan))]))
    if cluster is not None:
        sections.append(Section("cluster", "The cluster", figures=[topology_figure(cluster)]))
    return sections


def diff_section(a: Placement, b: Placement, trace: Trace | None) -> Section:
    """From A to B: which is better in what, what must be loaded, how hot devices are. MoeplanError where the shapes
    differ."""
    found = compare(a, b, trace)
    size = f", {bytes_text(found.bytes)} of weights" if found.bytes is not None else ""
    moved = f"From A to B the devices load {sum(found.copies)} copies{size}."
    rows = [
        (
            "fitted" if d.part == "fit" else "held out",
            MEASURES[d.measure],
            f"{d.a:.4g}",
            f"{d.b:.4g}",
            f"{d.change:+.1%}",
            d.better,
        )
        for d in found.differences
    ]
    columns = ("tokens", "measure", "A", "B", "B against A", "better")
    table = Table("scores, lower is better", columns, rows, numbers=frozenset({2, 3, 4}))
    figures = [moved_figure(a, b)]
    if trace is not None:
        loads: list[np.ndarray] = [over_ideal(p, trace.for_placement().expert_counts) for p in (a, b)]
        figures.append(loads_figure(*loads))
    texts = [*found.verdict, moved, *map(readable_note, found.notes)]
    return Section("diff", "A and B", texts, [table], figures, verdict=True)


def about_placement(placement: Placement) -> list[str]:
    """Of what and by whom, in lines."""
    hosts = len({device.host for device in placement.devices})
    slots = sum(device.capacity for device in placement.devices)
    of = f"{readable(placement.model)}: " if placement.model else ""
    return [
        f"{of}{len(placement.layers)} layers of {placement.num_experts} experts on {len(placement.devices)} devices of "
        f"{hosts} host{'s' if hosts > 1 else ''}, {slots} slots per layer; {placement.objective}, {placement.movement}."
    ]


def about_plan(plan: Plan) -> list[str]:
    hosts = len({device.host for device in plan.devices})
    return [
        f"{readable(plan.model.name)} at {plan.workload}, {plan.dtype}, on {len(plan.devices)} devices of {hosts} "
        f"host{'s' if hosts > 1 else ''}."
    ]


def readable_note(note: str) -> str:
    """A note of any length without control characters."""
    return "Note: " + "".join(c if c.isprintable() else "?" for c in note)

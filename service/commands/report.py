"""``moeplan report``: a plan or a placement as one file of HTML, to look at and to send."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from ...spec.cluster import Cluster
from ...spec.document import describe, parse_object, read_text, show, write_atomically
from ...spec.errors import DocumentError, MoeplanError
from ...spec.placement import Placement
from ...spec.plan import Plan
from ...spec.report import Report
from ...spec.trace import Trace
from ..console import note, print_json, say
from ..extra import DRAWN, check_service
from ..options import output_option

if TYPE_CHECKING:
    from ..web.content import Section
    from ..web.figures.front import PrintedFront

BESIDE = {"REPORT": "plan", "--against": "placement", "--front": "placement"}
"""What goes with which document only."""


def report(
    document: Annotated[Path, typer.Argument(help="What `moeplan solve` or `moeplan place` wrote.")],
    measured: Annotated[
        Path | None, typer.Argument(metavar="[REPORT]", help="Of a plan: what `moeplan run` wrote of it.")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="What `moeplan profile` wrote: its topology, and a plan's predicted timeline.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Routing (.npz); by default the one that the document names, if it is there.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Of a placement: an older one; what moves from that to this.")
    ] = None,
    front: Annotated[
        Path | None, typer.Option(help="Of a placement: what `moeplan place --pareto PICTURE --json` printed.")
    ] = None,
    output: Annotated[Path, output_option("The report, one file that loads nothing.")] = Path("report.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print what is in it as JSON.")] = False,
) -> None:
    """Draw a plan or a placement in one HTML file, which needs no network and no moeplan: to look at and to send.

    Example: `moeplan report place.json --trace trace.npz -o report.html`

    Example: `moeplan report plan.json report.json --cluster cluster.json`
    """
    check_service(*DRAWN)
    text = read_text(document, Placement.hint())
    kind = parse_object(text, str(document)).get("kind")
    if kind not in (Plan.kind, Placement.kind):
        raise DocumentError(
            f"{document}: expected a plan or a placement: `moeplan solve` and `moeplan place` make them"
        )
    is_plan = kind == Plan.kind
    for name, value in {"REPORT": measured, "--against": against, "--front": front}.items():
        if value is not None and (BESIDE[name] == "plan") != is_plan:
            raise MoeplanError(f"{name} goes with a {BESIDE[name]}, {document} is none: leave it out")
    if is_plan:
        title, about, sections = _of_plan(Plan.parse(text, str(document)), document, measured, cluster, trace)
    else:
        placement = Placement.parse(text, str(document))
        title, about, sections = _of_placement(placement, document, cluster, trace, against, front)
    from ..web.report import report_html

    page = report_html(title, about, sections).encode()
    write_atomically(output, lambda f: f.write(page))
    if as_json:
        figures = [figure.name for section in sections for figure in section.figures]
        print_json({"file": str(output), "bytes": len(page), "title": title, "figures": figures})
    else:
        say(f"wrote {output} ({len(page) / 2**20:.1f} MiB); open it in a browser")


def _of_placement(
    placement: Placement,
    path: Path,
    cluster: Path | None,
    trace: Path | None,
    against: Path | None,
    front: Path | None,
) -> "tuple[str, list[str], list[Section]]":
    from ..web.content import about_placement, diff_section, placement_sections
    from ..web.figures.figure import readable

    machines = Cluster.read(cluster) if cluster else None
    recorded = _trace(trace, placement.trace.path, path)
    sections = placement_sections(placement, recorded, machines, _front(front))
    if against is not None:
        sections.insert(1, diff_section(Placement.read(against), placement, recorded))
    name = f"Placement of {readable(placement.model)}" if placement.model else "Placement"
    return f"{name}: {readable(path.name)}", about_placement(placement), sections


def _of_plan(
    plan: Plan, path: Path, measured: Path | None, cluster: Path | None, trace: Path | None
) -> "tuple[str, list[str], list[Section]]":
    from ..simulated import simulated
    from ..web.content import about_plan, plan_sections
    from ..web.figures.figure import readable

    report = Report.read(measured) if measured else None
    if report is not None and report.plan != plan.digest():
        note(f"{measured} is of another plan (digest {report.plan}, this one has {plan.digest()})")
    machines, predicted = Cluster.read(cluster) if cluster else None, None
    if machines is not None:
        recorded = _trace(trace, plan.routing.path, path)
        if plan.routing.kind == "trace" and recorded is None:
            note("the plan's trace is not here, so that its predicted timeline is left out: pass one with --trace")
        else:
            predicted = simulated(plan, machines, recorded, str(cluster))
    title = f"Plan for {readable(plan.model.name)}: {readable(path.name)}"
    return title, about_plan(plan), plan_sections(plan, report, machines, predicted)


def _trace(given: Path | None, named: str, beside: Path) -> Trace | None:
    """The one given, else the one that the document names, from here or from beside it; None where it is not there."""
    if given is not None:
        return Trace.read(given)
    for path in (Path(named), beside.parent / named) if named else ():
        if path.is_file():
            return Trace.read(path)
    return None


def _front(path: Path | None) -> "PrintedFront | None":
    """The front in what ``place --json`` printed."""
    from ..web.figures.front import PrintedFront

    if path is None:
        return None
    hint = "; `moeplan place --pareto front.png --json` prints one"
    found = parse_object(read_text(path, hint), str(path)).get("pareto")
    if not isinstance(found, dict):
        raise DocumentError(f"{path}: pareto: expected an object, got {show(found)}{hint}")
    try:
        return PrintedFront.model_validate_json(json.dumps(found), strict=True)
    except ValidationError as error:
        raise DocumentError(f"{path}: pareto: {describe(error)}{hint}") from None

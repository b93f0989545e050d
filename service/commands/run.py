"""``moeplan run``: execute a plan and check it."""

from pathlib import Path
from typing import Annotated

import typer

from ...planner.simulator import Timeline
from ...spec.catalogue.executed import load_executed
from ...spec.cluster import Cluster
from ...spec.document import write_atomically
from ...spec.errors import MoeplanError
from ...spec.picture import is_picture
from ...spec.placement import Placement
from ...spec.plan import Plan
from ...spec.report import Report
from ...spec.trace import Trace
from ...spec.workload import Workload
from ..console import note, out, print_json, progress, say
from ..options import CLUSTER, WORKLOAD, output_option, picture_option
from ..pages.report import draw_report, machine_notes, report_table
from ..pages.selection import selection_table
from ..pages.timeline import perfetto
from ..pages.timeline_picture import draw_timeline
from ..selecting import selected_of
from ..simulated import simulated

PLANNING = 1e6  # seconds, which is no limit: under torchrun every rank must make the same plan


def run(
    plan_path: Annotated[
        Path | None, typer.Argument(metavar="PLAN", help="What `moeplan solve` wrote; or give --placement.")
    ] = None,
    placement: Annotated[
        Path | None,
        typer.Option(help="Instead of a plan: run the model under ep with experts where this file of `place` says."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="With --placement: catalogue name or path of a config.json.")
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(
            help="With --placement or --timeline: what `moeplan profile` wrote; with --placement by default "
            "cluster.json."
        ),
    ] = None,
    workload: Annotated[
        str | None,
        typer.Option(help=f"With --placement: prefill:TOKENS[@LENGTH] or decode:SEQUENCES[@CONTEXT]; {WORKLOAD}."),
    ] = None,
    lab: Annotated[Path | None, typer.Option(help="Run inside the emulated cluster of this YAML file.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="The plan's trace, where it has moved; with --placement, the routing.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Folder with Hugging Face safetensors, plain or quantised; by default random weights."),
    ] = None,
    own_routing: Annotated[
        bool, typer.Option("--own-routing", help="The model's routers choose the experts, not the plan's trace.")
    ] = False,
    select: Annotated[
        str | None,
        typer.Option(
            metavar="RULE:N",
            help="Compare decoding steps that use fewer experts with the model's own routing: lynx:EXPERTS of a layer "
            "for the batch, or piggyback:CHOICES of a token that are always kept.",
        ),
    ] = None,
    quality_budget: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="NATS",
            help="With --select: largest mean divergence of the next token's distribution that passes.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="With --select and --weights: text that the model reads; by default random tokens."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest error of the step: |predicted / measured - 1|.")
    ] = 0.5,
    repetitions: Annotated[int | None, typer.Option(min=1, help="Timed steps; by default what fits a minute.")] = None,
    timeout: Annotated[
        float,
        typer.Option(
            min=1,
            help="Seconds without a sign of life before the run ends and names who was lost: of any rank while they "
            "start, of all of them afterwards. Building kernels, once, is not in it.",
        ),
    ] = 300.0,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Rendezvous port; by default a free one.")] = None,
    output: Annotated[Path, output_option("The report document.")] = Path("report.json"),
    picture: Annotated[Path | None, picture_option("Draw predicted beside measured")] = None,
    timeline: Annotated[
        Path | None,
        output_option(
            "What every device did in the median step, for ui.perfetto.dev, or as a picture where the file's name "
            "ends in .png, .svg or .pdf; with --cluster beside it what was predicted.",
            "--timeline",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report instead of a table.")] = False,
) -> None:
    """Execute a plan or a placement, compare its output with a plain reference and its time with the prediction.

    Exit code 1 when either is beyond tolerance, or a selection's divergence above its budget. Under torchrun every
    process is a rank.

    Example: `moeplan run plan.json --picture report.png`; of a placement:
    `moeplan run --placement place.json --model olmoe --trace trace.npz --workload prefill:512`
    """
    planning = {"--model": model, "--cluster": cluster, "--workload": workload}
    if placement is not None:
        if plan_path is not None:
            raise MoeplanError(f"run takes {plan_path} or --placement: `moeplan solve --placement` plans with one")
        if model is None:
            raise MoeplanError("--placement needs --model: it says where experts are, not what they compute")
        plan = _placed(placement, model, cluster or CLUSTER, workload or WORKLOAD, trace)
    else:
        if timeline is not None:
            del planning["--cluster"]
        plan = _planned(plan_path, [option for option, value in planning.items() if value is not None])
        trace = trace or _recorded(plan, plan_path)
    selecting = selected_of(plan, select, quality_budget, text, weights)
    predicted = _simulated(plan, cluster, trace) if timeline and cluster else None
    # torch takes seconds to import: wrong files are refused before.
    from ...profiler import PROBE
    from ...runtime.launch import EnvironmentLauncher
    from ...runtime.launch.choose import choose_launcher, is_primary
    from ...runtime.run import run as execute

    if plan.lab and lab is None and not EnvironmentLauncher.present():
        what = plan_path or f"the cluster of {placement}"
        raise MoeplanError(f"{what} was made in the lab {plan.lab!r}: give its file with --lab")
    with (
        choose_launcher(lab, len(plan.devices), plan.devices[0].kind, port, plan) as launcher,
        progress("running") as show,
    ):
        report = execute(
            plan,
            launcher,
            trace=trace,
            weights_folder=weights,
            own_routing=own_routing,
            tolerance=tolerance,
            repetitions=repetitions,
            timeout=timeout,
            probe=PROBE,
            timeline=timeline is not None,
            selecting=selecting,
            on_event=show,
        )
        if not is_primary(launcher):
            return
    report.write(output)
    if picture:
        draw_report(report, picture)
    if timeline:
        _write_timeline(report, predicted, timeline)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        out.print(report_table(report))
        if report.selection:
            out.print(selection_table(report.selection))
        for known in (*report.notes, *machine_notes(report)):
            note(known)
        say(f"wrote {' and '.join(str(path) for path in (output, picture, timeline) if path)}")
    if not report.passed:
        raise typer.Exit(1)


def _write_timeline(report: Report, predicted: Timeline | None, path: Path) -> None:
    """Draw it or write it for Perfetto, as the file's ending says."""
    if is_picture(path):
        draw_timeline(f"{report.model}, {report.workload}", report.timeline, predicted, path)
    else:
        events = perfetto(report.timeline, predicted)
        write_atomically(path, lambda f: f.write(events.encode()))


def _simulated(plan: Plan, cluster: Path, trace: Path | None) -> Timeline:
    """The plan's step as predicted on the cluster that it was made for."""
    path = trace or (Path(plan.routing.path) if plan.routing.path else None)
    return simulated(plan, Cluster.read(cluster), Trace.read(path) if path else None, str(cluster))


def _planned(path: Path | None, planning: list[str]) -> Plan:
    """The plan of a file; planning: options given that only a placement needs."""
    if path is None:
        raise MoeplanError("run needs a PLAN, which `moeplan solve` writes, or --placement with --model")
    if planning:
        raise MoeplanError(f"{planning[0]} goes with --placement: {path} says it already; solve again to change it")
    return Plan.read(path)


def _recorded(plan: Plan, path: Path | None) -> Path | None:
    """Where the trace lies that the plan names, if that is beside the plan and not below the current folder."""
    if path is None or not plan.routing.path or Path(plan.routing.path).exists():
        return None
    beside = path.parent / plan.routing.path
    return beside if beside.exists() else None


def _placed(placement: Path, model: str, cluster: Path, workload: str, trace: Path | None) -> Plan:
    """The plan that keeps to a placement, made as `moeplan solve --placement` makes it."""
    # Imported when it is needed: a plan is run without a solver.
    from ...planner.budget import Budget
    from ...planner.search import solve

    with progress("planning") as show:
        return solve(
            load_executed(model),
            Cluster.read(cluster),
            Workload.from_text(workload),
            Trace.read(trace) if trace else None,
            trace_path=str(trace or ""),
            asked=model,
            placement=Placement.read(placement),
            placement_path=str(placement),
            budget=Budget.of(PLANNING, on_event=show),
        )

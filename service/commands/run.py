"""``moeplan run``: execute a plan and check it."""

from pathlib import Path
from typing import Annotated

import typer

from ...spec.errors import MoeplanError
from ...spec.plan import Plan
from ..console import note, out, print_json, progress, say
from ..options import output_option, picture_option
from ..pages.report import draw_report, machine_notes, report_table


def run(
    plan_path: Annotated[Path, typer.Argument(metavar="PLAN", help="What `moeplan solve` wrote.")],
    lab: Annotated[Path | None, typer.Option(help="Run inside the emulated cluster of this YAML file.")] = None,
    trace: Annotated[Path | None, typer.Option(help="The plan's trace, where it has moved.")] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Folder with Hugging Face safetensors, plain or quantised; by default random weights."),
    ] = None,
    own_routing: Annotated[
        bool, typer.Option("--own-routing", help="The model's routers choose the experts, not the plan's trace.")
    ] = False,
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
    as_json: Annotated[bool, typer.Option("--json", help="Print the report instead of a table.")] = False,
) -> None:
    """Execute a plan, compare its output with a plain reference and its time with the prediction.

    Exit code 1 when either is beyond tolerance. Under torchrun every process is a rank.

    Example: `moeplan run plan.json --picture report.png`
    """
    # torch takes seconds to import: only when it is needed.
    from ...profiler import PROBE
    from ...runtime.launch import EnvironmentLauncher
    from ...runtime.launch.choose import choose_launcher, is_primary
    from ...runtime.run import run as execute

    plan = Plan.read(plan_path)
    if plan.lab and lab is None and not EnvironmentLauncher.present():
        raise MoeplanError(f"{plan_path} was made in the lab {plan.lab!r}: give its file with --lab")
    with (
        choose_launcher(lab, len(plan.devices), plan.devices[0].kind, port) as launcher,
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
            on_event=show,
        )
        if not is_primary(launcher):
            return
    report.write(output)
    if picture:
        draw_report(report, picture)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        out.print(report_table(report))
        for known in (*report.notes, *machine_notes(report)):
            note(known)
        say(f"wrote {output}" + (f" and {picture}" if picture else ""))
    if not report.passed:
        raise typer.Exit(1)

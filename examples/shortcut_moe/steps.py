"""What a step of each trained form costs in moeplan, beside its loss: measured, solved, run on the trained weights.

    python examples/shortcut_moe/steps.py DIR --lab examples/labs/two-hosts.yaml

DIR is what train.py wrote. Without --lab two local ranks are the devices. The plans run in turn, several rounds.
"""

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from moeplan import Cluster, Plan, Report, Trace, Workload
from moeplan.examples.shortcut_moe.shortcut_moe import FORMS, form_model
from moeplan.planner.search import solve
from moeplan.profiler import profile
from moeplan.runtime.launch import Launcher
from moeplan.runtime.launch.choose import choose_launcher
from moeplan.runtime.run import run
from moeplan.spec import MoeplanError
from moeplan.spec.files import read_text
from moeplan.spec.report import PartComparison
from moeplan.spec.texts import parse_object

TRAVEL = ("dispatch", "combine")  # parts in which devices wait for tokens
STEP_SECONDS = 8.0  # of timed steps, each plan and round
PLANNED, MEASURED = "predicted", "measured"


class Contender(NamedTuple):
    """A form's plan and the folder of its weights and trace."""

    form: str
    plan: Plan
    folder: Path


def contenders(folder: Path, cluster: Cluster, workload: Workload) -> dict[str, Contender]:
    """Both forms under ep; the standard one also as solve likes best, where that is another strategy."""
    found = {}
    for form in FORMS:
        path = folder / form / "trace.npz"
        trace, model = Trace.read(path), form_model(form)
        plan = solve(model, cluster, workload, trace, strategy="ep", trace_path=str(path))
        found[form] = Contender(form, plan, folder / form)
        best = solve(model, cluster, workload, trace, trace_path=str(path))
        used = sorted({layer.strategy for layer in best.layers})
        if used != ["ep"]:
            found[f"{form}, {' and '.join(used)}"] = Contender(form, best, folder / form)
    return found


def executed(name: str, contender: Contender, launcher: Launcher) -> Report:
    """Raises MoeplanError where the output differs from the reference's."""
    weights = contender.folder
    report = run(contender.plan, launcher, weights_folder=weights, tolerance=10.0, step_budget=STEP_SECONDS)
    if report.check is None or not report.check.passed:
        error = "not checked" if report.check is None else f"relative error {report.check.relative_error:.1e}"
        raise MoeplanError(f"{name}: the output is not the reference's: {error}")
    return report


def waiting(parts: tuple[PartComparison, ...], kind: str) -> float:
    """Seconds of a step in which devices wait for tokens, mean over devices."""
    return sum(getattr(part, kind) for part in parts if part.part in TRAVEL)


def table(found: dict[str, Contender], reports: dict[str, list[Report]], losses: dict[str, float]) -> Table:
    """One column per plan: medians over the rounds; hidden: how much less waiting than in the first plan."""
    shown = Table(box=None)
    shown.add_column("")
    for name in found:
        shown.add_column(name, justify="right")
    steps = {name: [report.step for report in done] for name, done in reports.items()}
    waits = {
        kind: {name: median(waiting(report.parts, kind) for report in done) for name, done in reports.items()}
        for kind in (PLANNED, MEASURED)
    }
    first = next(iter(found))
    layers = {name: contender.plan.layers for name, contender in found.items()}
    rows = {
        "held-out bits per byte": [f"{losses[contender.form]:.3f}" for contender in found.values()],
        "slot of each layer": [" ".join(str(layer.slot) for layer in plans) for plans in layers.values()],
        "chunks of each layer": [" ".join(str(layer.chunks) for layer in plans) for plans in layers.values()],
        "step, predicted ms": [f"{own[0].predicted * 1e3:.1f}" for own in steps.values()],
        "step, measured ms": [f"{median(one.measured for one in own) * 1e3:.1f}" for own in steps.values()],
        "  lowest and highest round": [
            f"{min(one.measured for one in own) * 1e3:.1f} to {max(one.measured for one in own) * 1e3:.1f}"
            for own in steps.values()
        ],
    }
    for kind, waited in waits.items():
        rows[f"waiting for tokens, {kind} ms"] = [f"{seconds * 1e3:.1f}" for seconds in waited.values()]
        rows[f"  of the first's hidden, {kind}"] = [
            "" if name == first else f"{1 - seconds / waited[first]:.0%}" for name, seconds in waited.items()
        ]
    errors = [max(report.check.relative_error for report in done if report.check) for done in reports.values()]
    rows["output against the reference"] = [f"{error:.0e}" for error in errors]
    for label, cells in rows.items():
        shown.add_row(label, *cells)
    return shown


def read_losses(folder: Path) -> dict[str, float]:
    """Held-out bits per byte of each form."""
    path = folder / "losses.json"
    if not path.is_file():
        raise MoeplanError(f"{path}: not there; write it with python examples/shortcut_moe/train.py --output {folder}")
    body = parse_object(read_text(path), str(path))
    try:
        return {form: float(body[form]["bits_per_byte"]) for form in FORMS}
    except (KeyError, TypeError, ValueError):
        raise MoeplanError(f"{path}: expected bits_per_byte of {' and '.join(FORMS)}; train again") from None


def main() -> None:
    parser = argparse.ArgumentParser(description="Run both trained forms and show their steps beside their losses.")
    parser.add_argument("folder", type=Path, help="What train.py wrote.")
    parser.add_argument("--lab", type=Path, help="An emulated cluster, which needs root; two local ranks without it.")
    parser.add_argument("--workload", default="prefill:2048@128", help="The step: prefill:TOKENS[@LENGTH].")
    parser.add_argument("--rounds", type=int, default=3, help="How often each plan runs, in turn.")
    parser.add_argument("--budget", type=float, default=75.0, help="Seconds to spend on measuring, about.")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: give 1 or more")

    console = Console(width=100)
    losses, workload = read_losses(options.folder), Workload.from_text(options.workload)
    with choose_launcher(lab=options.lab) as launcher:
        cluster = profile(launcher, [form_model(form) for form in FORMS], budget_seconds=options.budget)
        found = contenders(options.folder, cluster, workload)
        reports: dict[str, list[Report]] = {name: [] for name in found}
        for _ in range(options.rounds):
            for name, contender in found.items():
                reports[name].append(executed(name, contender, launcher))
    where = options.lab or "two local ranks"
    console.print(f"{where}, {workload}; medians of {options.rounds} rounds")
    console.print(table(found, reports, losses))


if __name__ == "__main__":
    try:
        main()
    except MoeplanError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

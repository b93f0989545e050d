"""A report as a table and as a picture."""

from collections import defaultdict
from pathlib import Path

from rich.text import Text

from ...spec.operators import PARTS
from ...spec.picture import plain, save_picture
from ...spec.report import Report, WeightsCheck
from .tables import WholeTable

SLOWER = 1.15  # times as long as profiled, or as short: beyond what one quiet profile differs from the next


def by_part(report: Report) -> list[tuple[str, float, float]]:
    """Part, predicted and measured seconds summed over layers, in the order of a step."""
    predicted: dict[str, float] = defaultdict(float)
    measured: dict[str, float] = defaultdict(float)
    for row in report.parts:
        predicted[row.part] += row.predicted
        measured[row.part] += row.measured
    return [(part, predicted[part], measured[part]) for part in PARTS if predicted[part] or measured[part]]


def report_table(report: Report) -> WholeTable:
    """Predicted, measured and error by part, then the whole step and the numerical check."""
    table = WholeTable(title=f"{report.model}, {report.workload}: predicted and measured")
    table.add_column("part")
    for name in ("predicted ms", "measured ms", "error"):
        table.add_column(name, justify="right")
    for part, predicted, measured in by_part(report):
        error = f"{(predicted - measured) / measured:+.0%}" if measured else "-"
        table.add_row(part, f"{predicted * 1e3:.2f}", f"{measured * 1e3:.2f}", error)
    step = report.step
    table.add_section()
    table.add_row(
        Text.assemble(("step", "bold"), f" (median of {report.repetitions}, spread {step.spread:.0%})"),
        f"{step.predicted * 1e3:.2f}",
        f"{step.measured * 1e3:.2f}",
        Text(f"{step.error:+.1%}", style="bold"),
    )
    if (machine := report.machine) and (rescaled := machine.rescaled):
        table.add_row(
            "step, re-scaled to the machine as it is now",
            f"{rescaled.predicted * 1e3:.2f}",
            f"{rescaled.measured * 1e3:.2f}",
            f"{rescaled.error:+.1%}",
        )
    if report.check:
        check = report.check
        table.add_row(
            f"output against the reference ({check.layers} layers, {check.tokens} tokens)",
            f"<= {check.tolerance:.0e}",
            f"{check.relative_error:.1e}",
            _result(check.passed),
        )
    if report.weights:
        add_weights_rows(table, report.weights)
    table.caption = Text(verdict(report), "green" if report.passed else "red")
    table.caption_justify = "left"
    return table


def verdict(report: Report) -> str:
    """What decides the exit code, and by how much."""
    error, allowed = abs(report.step.error), report.tolerance
    side = "within" if error <= allowed else "beyond"
    text = f"{side} tolerance: the predicted step is off by {error:.1%}, {allowed:.0%} are allowed (--tolerance)"
    if report.passed or side == "beyond":
        return text
    return f"{text}; but what was computed differs from what it should be"


def add_weights_rows(table: WholeTable, weights: WeightsCheck) -> None:
    """How the weights were checked: recomputed from the files, and against Transformers where it can load them."""
    result = _result(not weights.differing)
    table.add_row(
        f"weights ({weights.stored}) computed again ({weights.values} values)", "0", str(weights.differing), result
    )
    if weights.relative_error is None:
        table.add_row("logits against Transformers' own loading", "", "", "not compared")
        return
    result = _result(weights.relative_error <= weights.tolerance)
    table.add_row(
        f"logits against Transformers {weights.transformers} ({weights.layers} layers, {weights.tokens} tokens)",
        f"<= {weights.tolerance:.0e}",
        f"{weights.relative_error:.1e}",
        result,
    )


def _result(passed: bool) -> Text:
    return Text("ok") if passed else Text("differs", "bold red")


def machine_notes(report: Report) -> list[str]:
    """What is worth a note about the machine: slower or faster than when it was profiled."""
    machine = report.machine
    notes: list[str] = []
    if machine is None:
        return notes
    changed = [probe for probe in machine.probes if not 1 / SLOWER < probe.factor < SLOWER]
    if changed and machine.rescaled:
        factors = ", ".join(f"{probe.operator} ({probe.kind}) {probe.factor:.2f} times" for probe in machine.probes)
        notes.append(
            f"the machine has changed since it was profiled: a probe took {factors} as long; prediction re-scaled by "
            f"it: {machine.rescaled.predicted * 1e3:.2f} ms ({machine.rescaled.error:+.1%})"
        )
    return notes


def draw_report(report: Report, path: Path) -> None:
    """Two bars, predicted and measured, divided by part; the format follows the file's ending."""
    from matplotlib.figure import Figure

    rows = by_part(report)
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    left = {"predicted": 0.0, "measured": 0.0}
    for part, predicted, measured in rows:
        widths = [predicted * 1e3, measured * 1e3]
        axes.barh(list(left), widths, left=list(left.values()), label=part)
        left = {name: start + width for (name, start), width in zip(left.items(), widths, strict=True)}
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of one step (mean over devices)")
    axes.set_title(plain(f"{report.model}, {report.workload}: step error {report.step.error:+.1%}"))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    save_picture(figure, path)

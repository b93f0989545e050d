"""A calibration as tables and sentences."""

from rich import box
from rich.text import Text

from ...spec.calibration import Calibration
from .tables import WholeTable


def points_table(found: Calibration) -> WholeTable:
    """Each point: predicted, corrected, measured, a line for each time."""
    table = WholeTable(title="points: predicted, corrected, measured", box=box.SIMPLE_HEAD)
    for name in ("isl", "osl", "concurrency", "ms of", "predicted", "corrected", "measured"):
        table.add_column(name, justify="right")
    for point in found.points:
        mended = found.corrected(point.predicted)
        m = point.measured
        load = (str(m.isl), str(m.osl), str(m.concurrency))
        for name, title in (("tpot_ms", "TPOT"), ("ttft_ms", "TTFT")):
            cells = [_cell(getattr(times, name)) for times in (point.predicted, mended, m)]
            table.add_row(*load, title, *cells)
            load = ("", "", "")
    return table


def factors_text(found: Calibration) -> Text:
    """The factors and the errors, a sentence each."""
    lines = [
        f"TPOT: compute x {found.compute_scale:.3f}, and {found.step_overhead_ms:.3f} ms a step. "
        + _error(found.error_before.tpot, found.error_left_out.tpot),
        f"TTFT: prefill x {found.prefill_scale:.3f}. " + _error(found.error_before.ttft, found.error_left_out.ttft),
    ]
    return Text("\n".join(lines))


def _error(before: float | None, after: float | None) -> str:
    if before is None:
        return "Nothing was measured of it."
    left = "one point alone cannot say" if after is None else f"{after:.1%}"
    return f"Mean error of these points: {before:.1%} before; corrected by the others alone: {left}."


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"

"""The page and the picture of what moves buy. Nothing is printed here."""

from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ...planner.place.moves_front import MovesFront
from ...spec.picture import save_picture
from ...spec.placement import Score

FITTED, HELD_OUT = "#1f4e79", "#c0722c"
LABELS = {
    "balance_mean": "balance (hottest device\nover the ideal, mean over layers)",
    "boundary_cross_host": "tokens that change hosts\nat a boundary of layers",
    "boundary_cross_device": "tokens that change devices\nat a boundary of layers",
    "fanout_host": "hosts that hold\na token's experts",
    "fanout_device": "devices that hold\na token's experts",
}
COLUMNS = {"x host": "boundary_cross_host", "x device": "boundary_cross_device", "hosts": "fanout_host"}


def moves_page(front: MovesFront) -> Group:
    """Balance and movement of every point; numbers are those of the picture."""
    first = front.points[0].scores
    parts = [(title, part) for title, part in (("fit", "fit"), ("held out", "held_out")) if getattr(first, part)]
    shown = {title: field for title, field in COLUMNS.items() if getattr(first.fit, field) is not None}
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("copies loaded", *(f"{t}: {c}" for t, _ in parts for c in ("balance", "worst", *shown))):
        table.add_column(title, justify="right")
    for point in front.points:
        cells = []
        for _, part in parts:
            score: Score = getattr(point.scores, part)
            cells += [score.balance_mean, score.balance_max, *(getattr(score, field) for field in shown.values())]
        table.add_row(f"{point.copies:,}", *("-" if v is None else f"{v:.3f}" for v in cells))
    return Group(Text("what moves buy", style="bold"), table, Text(f"searched in {front.seconds:.1f} s\n"))


def draw_moves(front: MovesFront, path: Path) -> None:
    """Copies loaded along; up, in a panel each, what was minimised, then balance. The file's ending is the format."""
    from matplotlib.figure import Figure

    panels = tuple(dict.fromkeys((*front.minimised, "balance_mean")))
    figure = Figure(figsize=(8, 2.6 + 2.6 * len(panels)), layout="constrained")
    copies = [point.copies for point in front.points]
    rows = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for axes, field in zip(rows, panels, strict=True):
        for part, title, colour in (("fit", "fitted part", FITTED), ("held_out", "held-out part", HELD_OUT)):
            scored = [getattr(point.scores, part) for point in front.points]
            if scored[0] is not None:
                values = [getattr(score, field) for score in scored]
                axes.plot(copies, values, "-o", color=colour, markersize=5, label=title)
        axes.set_ylabel(LABELS[field])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    rows[-1].set_xlabel("copies that devices must load")
    if max(copies) > 50:
        rows[-1].set_xscale("symlog", linthresh=1)
    rows[0].set_title("what moves buy", fontsize=11, loc="left")
    rows[0].legend(frameon=False, loc="best")
    save_picture(figure, path)

"""The page and the picture of a Pareto front. Nothing is printed here."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ...planner.place.pareto import Front, Part, Point
from ...spec.picture import save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {"placement": "this", "linear": "linear", "eplb": "EPLB", "coolest": "coolest", "locality": "locality only"}
TITLES: dict[Part, str] = {"fit": "fit", "held_out": "held out"}
HOST, DEVICE = "#1f4e79", "#c0722c"


def page(front: Front) -> Group:
    """Balance and movement of every point, fitted and held out; numbers are those of the picture."""
    parts: list[Part] = [part for part in TITLES if getattr(front.points[0].scores, part) is not None]
    what = ("x host", "x device") if front.host.startswith("boundary") else ("hosts", "devices")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("#", justify="right")
    table.add_column("placement", no_wrap=True)
    table.add_column("cap", justify="right")
    for part in parts:
        for title in (f"{TITLES[part]}: balance", *what):
            table.add_column(title, justify="right")
    for number, point in enumerate(front.points, 1):
        cells = [
            f"{v:.3f}" for part in parts for v in (front.score(point, part).balance_mean, *front.moved(point, part))
        ]
        cap = "-" if point.cap is None else f"{point.cap:.3f}"
        style = "bold" if point.name == "placement" else "" if point.on_front else "dim"
        table.add_row(str(number), _name(point), cap, *cells, style=style)
    return Group(Text("what balance buys", style="bold"), table, Text(_below(front)))


def _name(point: Point) -> str:
    return NAMES.get(point.name, "") + ("" if point.on_front else " (beaten)")


def _below(front: Front) -> str:
    searches = f"each searched with at most {front.steps:,} steps, in {front.seconds:.1f} s together"
    dropped = f"; {front.dropped} beaten on the {TITLES[front.part]} part left out" if front.dropped else ""
    missed = ", ".join(f"{cap:.3f}" for cap in front.missed)
    return f"{searches}{dropped}" + (f"; nothing found in time for caps {missed}" if missed else "") + "\n"


def draw(front: Front, path: Path) -> None:
    """Balance along, movement up, one line between hosts and one between devices; the file's ending is the format."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.margins(x=0.1, y=0.1)
    crossing = front.host.startswith("boundary")
    for level, (colour, title) in enumerate([(HOST, "hosts"), (DEVICE, "devices")]):
        if level == 0 and not any(_varies(front)):
            continue  # on one host nothing moves between hosts
        _line(axes, front, level, colour, f"between {title}" if crossing else f"{title} per token")
    axes.set_xlabel(f"balance on the {TITLES[front.part]} part (hottest device over the ideal, mean over layers)")
    axes.set_ylabel("tokens that move at a boundary of layers" if crossing else "distinct places of a token's experts")
    if crossing:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(bottom=0)
    axes.set_title("what balance buys: the front, and what is compared with it", fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="best")
    save_picture(figure, path)


def _varies(front: Front) -> list[bool]:
    first = front.moved(front.points[0])[0]
    return [front.moved(point)[0] != first for point in front.points]


def _line(axes: "Axes", front: Front, level: int, colour: str, label: str) -> None:
    at = [(front.score(p).balance_mean, front.moved(p)[level]) for p in front.points]
    line = [xy for xy, p in zip(at, front.points, strict=True) if p.on_front]
    axes.plot(*zip(*line, strict=True), "-o", color=colour, markersize=5, label=label)
    for number, (xy, point) in enumerate(zip(at, front.points, strict=True), 1):
        chosen, left = point.name == "placement", point.name in ("placement", "coolest")
        if point.marked:
            axes.plot(
                *xy, "*" if chosen else "s", color=colour, markersize=15 if chosen else 8, markeredgecolor="white"
            )
        axes.annotate(
            f"{number} {NAMES[point.name]}" if point.marked else str(number),
            xy,
            xytext=(-7, -13) if left else (6, 6),  # where the front, which falls, leaves space
            textcoords="offset points",
            horizontalalignment="right" if left else "left",
            fontsize=9,
            color=colour,
            fontweight="bold" if point.marked else "normal",
        )

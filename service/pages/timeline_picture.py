"""What the devices did, and what was predicted, as a picture: the whole step, and its first layers closer.

A device has a row as it ran and a row as predicted; of the latter, what is computed is above and what travels beside it
below.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...planner.simulator import Timeline
from ...spec.operators import PARTS
from ...spec.picture import plain, save_picture
from ...spec.report import Lap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLOSER = 2  # layers that are drawn closer, where there are more
MOST_DEVICES = 16
ABOVE, BELOW, WHOLE = (
    (-0.45, 0.45),
    (0.0, 0.45),
    (-0.45, 0.9),
)  # of a row of height 1, from the top: from where, how high


class Bar(NamedTuple):
    """Milliseconds from the step's begin, in a row."""

    row: int
    begin: float
    end: float
    part: str
    layer: int
    extent: tuple[float, float]


def draw_timeline(title: str, measured: Sequence[Lap], predicted: Timeline | None, path: Path) -> None:
    """The format follows the file's ending. Without ``predicted`` there are only rows as they ran."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    devices = sorted({lap.device for lap in measured})[:MOST_DEVICES]
    kinds = 1 if predicted is None else 2
    bars = [*bars_run(measured, devices, kinds), *(bars_predicted(predicted, devices) if predicted else ())]
    layers = sorted({bar.layer for bar in bars if bar.layer >= 0})
    panels = [layers] if len(layers) <= CLOSER else [layers, layers[:CLOSER]]
    figure = Figure(figsize=(11, len(panels) * (0.9 + 0.34 * kinds * len(devices))), layout="constrained")
    colours: dict[str, str] = {part: f"C{i}" if i < 10 else f"{0.25 + 0.06 * i:.2f}" for i, part in enumerate(PARTS)}
    names = [f"device {device}, {what}" for device in devices for what in ("ran", "predicted")[:kinds]]
    for axes, shown in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _draw(axes, bars if shown is layers else _first(bars, set(shown), kinds), names, colours)
        what = "whole step" if shown is layers else f"layers {shown[0]} to {shown[-1]}, each row from where they begin"
        axes.set_title(plain(f"{title}: {what}"), fontsize=10, loc="left")
    present = {bar.part for bar in bars}
    handles = [Patch(color=colours[part], label=part) for part in PARTS if part in present]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize="small")
    save_picture(figure, path)


def bars_run(laps: Sequence[Lap], devices: Sequence[int], kinds: int) -> Iterable[Bar]:
    rows = {device: kinds * i for i, device in enumerate(devices)}
    for lap in laps:
        if lap.end > lap.begin and lap.device in rows:
            yield Bar(rows[lap.device], lap.begin * 1e3, lap.end * 1e3, lap.part, lap.layer, WHOLE)


def bars_predicted(timeline: Timeline, devices: Sequence[int]) -> Iterable[Bar]:
    rows = {device: 2 * i + 1 for i, device in enumerate(devices)}
    for op, begin, end in zip(timeline.operations, timeline.start, timeline.end, strict=True):
        if end > begin and op.device in rows:
            extent = BELOW if op.transfer else ABOVE
            yield Bar(rows[op.device], begin * 1e3, end * 1e3, op.part, op.layer, extent)


def _first(bars: Sequence[Bar], layers: set[int], kinds: int) -> list[Bar]:
    """Those of some layers, of all devices from when the first one begins them, as they ran and as predicted apart."""
    chosen = [bar for bar in bars if bar.layer in layers]
    begin = {kind: min((bar.begin for bar in chosen if bar.row % kinds == kind), default=0.0) for kind in range(kinds)}
    return [
        bar._replace(begin=bar.begin - begin[bar.row % kinds], end=bar.end - begin[bar.row % kinds]) for bar in chosen
    ]


def _draw(axes: "Axes", bars: Sequence[Bar], names: Sequence[str], colours: dict[str, str]) -> None:
    for row, part, extent in sorted({(bar.row, bar.part, bar.extent) for bar in bars}):
        spans = [
            (bar.begin, bar.end - bar.begin) for bar in bars if (bar.row, bar.part, bar.extent) == (row, part, extent)
        ]
        axes.broken_barh(
            spans, (row + extent[0], extent[1]), facecolors=colours[part], edgecolor="white", linewidth=0.2
        )
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)

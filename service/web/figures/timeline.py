"""When each device did what in a step: as predicted, as it ran, or both under each other."""

from collections.abc import Iterable, Sequence

from ....planner.simulator import Timeline
from ....spec.operators import PARTS
from ....spec.report import Lap
from ...pages.timeline_picture import Bar, bars_predicted, bars_run
from .figure import PART_COLOURS, Figure, View, axis, rows_height

MOST_DEVICES = 16
MOST_BARS = 6_000  # of a view; of more, the layers that come first are shown


def timeline_figure(measured: Sequence[Lap], predicted: Timeline | None) -> Figure | None:
    """None where nothing is known of either."""
    ran = {lap.device for lap in measured}
    foreseen = {op.device for op in predicted.operations} if predicted else set()
    devices = sorted(ran | foreseen)[:MOST_DEVICES]
    if not devices:
        return None
    kinds = [kind for kind, there in (("ran", measured), ("predicted", predicted)) if there]
    bars: list[tuple[str, Bar]] = []
    if measured:
        bars += [("ran", bar) for bar in bars_run(measured, devices, 1)]
    if predicted:
        bars += [("predicted", bar) for bar in bars_predicted(predicted, devices)]
    bars = [(kind, bar._replace(row=bar.row // (1 if kind == "ran" else 2))) for kind, bar in bars]
    layers = sorted({bar.layer for _, bar in bars if bar.layer >= 0})
    groups = {"whole step": bars}
    if len(layers) > 2:
        first = set(layers[:2])
        groups[f"layers {layers[0]} and {layers[1]}"] = [(kind, bar) for kind, bar in bars if bar.layer in first]
    views = [_view(label, own[:MOST_BARS], devices, kinds) for label, own in groups.items() if own]
    ends = {kind: max((bar.end for k, bar in bars if k == kind), default=0.0) for kind in kinds}
    said = ", ".join(f"{kind} {end:.2f} ms" for kind, end in ends.items())
    says = f"What {len(devices)} devices do in one step, part by part; it ends at: {said}."
    if len(bars) > MOST_BARS:
        says += f" The first {MOST_BARS:,} of {len(bars):,} bars are drawn."
    if len(ran | foreseen) > len(devices):
        says += f" {len(ran | foreseen) - len(devices)} more devices are left out."
    return Figure(
        "timeline",
        "Timeline of a step",
        says,
        ("device", "what", "part", "ms in all", "from ms", "to ms"),
        views,
        {
            "xaxis": axis("milliseconds", rangemode="tozero"),
            "yaxis": {"type": "category", "autorange": "reversed", "automargin": True},
            "barmode": "overlay",
            "bargap": 0.15,
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        },
        chooses="show",
        height=rows_height(len(devices) * len(kinds), each=26),
    )


def _view(label: str, bars: Sequence[tuple[str, Bar]], devices: Sequence[int], kinds: Sequence[str]) -> View:
    names = {(device, kind): f"device {device}, {kind}" for device in devices for kind in kinds}
    order = list(names.values())
    data = []
    for part in PARTS:
        own = [(names[devices[bar.row], kind], bar) for kind, bar in bars if bar.part == part]
        if not own:
            continue
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": part,
                "y": [name for name, _ in own],
                "base": [round(bar.begin, 4) for _, bar in own],
                "x": [round(bar.end - bar.begin, 4) for _, bar in own],
                "customdata": [[bar.layer, round(bar.end - bar.begin, 4)] for _, bar in own],
                "hovertemplate": f"%{{y}}<br>{part}, layer %{{customdata[0]}}<br>%{{customdata[1]}} ms<extra></extra>",
                "marker": {"color": PART_COLOURS[part], "line": {"width": 0}},
                # What travels runs beside what is computed: both stay visible.
                "opacity": 0.85,
            }
        )
    # Rows in order, also where the first part leaves some out.
    data.insert(0, {"type": "bar", "orientation": "h", "y": order, "x": [0] * len(order), "showlegend": False})
    data[0] |= {"hoverinfo": "skip"}
    return View(label, data, list(_rows(bars, devices, kinds)))


def _rows(bars: Sequence[tuple[str, Bar]], devices: Sequence[int], kinds: Sequence[str]) -> Iterable[tuple]:
    for row, device in enumerate(devices):
        for kind in kinds:
            for part in PARTS:
                own = [bar for k, bar in bars if (k, bar.row, bar.part) == (kind, row, part)]
                if own:
                    spent = sum(bar.end - bar.begin for bar in own)
                    begin, end = min(bar.begin for bar in own), max(bar.end for bar in own)
                    yield device, kind, part, round(spent, 3), round(begin, 3), round(end, 3)

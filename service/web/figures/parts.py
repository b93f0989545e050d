"""Where the time of a step goes, part by part: predicted, and beside it measured."""

from collections.abc import Sequence

from ....spec.operators import PARTS
from ....spec.plan import Plan
from ....spec.report import Report
from ...pages.report import by_part
from .figure import BLUE, ORANGE, PART_COLOURS, Figure, Row, View, axis


def compared_figure(report: Report) -> Figure:
    """Predicted beside measured seconds, of the whole step and of each of its layers."""
    layers = sorted({row.layer for row in report.parts})
    views = [_pair("whole step", by_part(report))]
    if len(layers) > 1:
        for layer in layers:
            rows = {row.part: (row.predicted, row.measured) for row in report.parts if row.layer == layer}
            own = [(part, *rows[part]) for part in PARTS if part in rows]
            views.append(_pair(f"layer {layer}" if layer >= 0 else "outside the layers", own))
    step = report.step
    return Figure(
        "parts",
        "Parts of a step, predicted and measured",
        f"The step was predicted to take {step.predicted * 1e3:.2f} ms and took {step.measured * 1e3:.2f} ms (median "
        f"of {report.repetitions}): the prediction is off by {step.error:+.1%}.",
        ("part", "predicted ms", "measured ms", "error"),
        views,
        {
            "barmode": "group",
            "xaxis": axis("", type="category"),
            "yaxis": axis("milliseconds, mean over devices", rangemode="tozero"),
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        },
        chooses="show",
    )


def _pair(label: str, parts: Sequence[tuple[str, float, float]]) -> View:
    names, predicted, measured = ([row[0] for row in parts], [row[1] for row in parts], [row[2] for row in parts])
    data = [
        {
            "type": "bar",
            "name": name,
            "x": names,
            "y": [round(1e3 * seconds, 5) for seconds in column],
            "marker": {"color": colour, "pattern": {"shape": shape, "fillmode": "overlay", "fgcolor": "#ffffff"}},
            "hovertemplate": f"%{{x}}, {name}<br>%{{y:.3f}} ms<extra></extra>",
        }
        for column, name, colour, shape in ((predicted, "predicted", BLUE, ""), (measured, "measured", ORANGE, "/"))
    ]
    rows = [(part, round(p * 1e3, 3), round(m * 1e3, 3), f"{(p - m) / m:+.0%}" if m else "-") for part, p, m in parts]
    return View(label, data, rows)


def predicted_figure(plan: Plan) -> Figure:
    """Predicted seconds of every layer, divided by part."""
    layers = [entry for entry in plan.predicted.layers if entry.parts]
    names = [str(entry.layer) if entry.layer >= 0 else "outside" for entry in layers]
    parts = [part for part in PARTS if any(part in entry.parts for entry in layers)]
    data = [
        {
            "type": "bar",
            "name": part,
            "x": names,
            "y": [round(entry.parts.get(part, 0.0) * 1e3, 5) for entry in layers],
            "marker": {"color": PART_COLOURS[part]},
            "hovertemplate": f"layer %{{x}}, {part}<br>%{{y:.3f}} ms<extra></extra>",
        }
        for part in parts
    ]
    table: list[Row] = [
        (name, *(round(entry.parts.get(part, 0.0) * 1e3, 3) for part in parts))
        for name, entry in zip(names, layers, strict=True)
    ]
    return Figure(
        "predicted",
        "Predicted step, layer by layer",
        f"One step is predicted to take {plan.predicted.step_seconds * 1e3:.2f} ms. Seconds of each layer by part, "
        "mean over devices; waiting counts in the part that waits.",
        ("layer", *(f"{part} ms" for part in parts)),
        [View("all", data, table)],
        {
            "barmode": "stack",
            "xaxis": axis("layer", type="category"),
            "yaxis": axis("milliseconds, mean over devices", rangemode="tozero"),
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        },
    )

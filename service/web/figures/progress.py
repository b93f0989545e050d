"""A search while it runs: the best found so far, and the bound that nothing can beat, over time."""

from collections.abc import Mapping, Sequence
from typing import Any

from .figure import BLUE, ORANGE, Figure, View, axis

LISTED = 20  # last rows of the table


def progress_figure(events: Sequence[Mapping[str, Any]], minimised: str = "") -> Figure:
    """events: in order, with ``seconds`` since the search began and, where known then, ``incumbent`` and ``bound``."""
    lines = {"best so far": ("incumbent", BLUE, "solid"), "proven bound": ("bound", ORANGE, "dash")}
    last = max((float(event["seconds"]) for event in events), default=0.0)
    data = []
    for name, (field, colour, dash) in lines.items():
        known = [(float(event["seconds"]), float(event[field])) for event in events if event.get(field) is not None]
        if known:
            known.append((last, known[-1][1]))
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": name,
                "x": [round(x, 2) for x, _ in known],
                "y": [y for _, y in known],
                "line": {"shape": "hv", "color": colour, "dash": dash, "width": 2.5},
                "marker": {"size": 5},
                "hovertemplate": f"{name}: %{{y:.5g}} after %{{x:.1f}} s<extra></extra>",
            }
        )
    rows = [
        (round(float(event["seconds"]), 1), _number(event.get("incumbent")), _number(event.get("bound")))
        for event in events
        if event.get("incumbent") is not None or event.get("bound") is not None
    ][-LISTED:]
    return Figure(
        "progress",
        "Best found and bound",
        _says(data, minimised),
        ("seconds", "best so far", "bound"),
        [View("all", data, rows)],
        {
            "xaxis": axis("seconds", rangemode="tozero"),
            "yaxis": axis("what is minimised"),
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        },
        height=300,
    )


def _says(data: Sequence[Mapping[str, Any]], minimised: str) -> str:
    best, bound = (trace["y"][-1] if trace["y"] else None for trace in data)
    if best is None:
        return "Nothing is found yet."
    what = f" ({minimised})" if minimised else ""
    text = f"The best so far is {best:.5g}{what}"
    if bound is None:
        return f"{text}; a bound is proven at the end of the search."
    gap = (best - bound) / best if best else 0.0
    return f"{text}, and nothing can be below {bound:.5g}: at most {max(gap, 0.0):.1%} could still be saved."


def _number(value: Any) -> str:
    return "" if value is None else f"{float(value):.5g}"

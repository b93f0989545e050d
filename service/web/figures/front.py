"""A Pareto front: what a little balance buys. A point picked, with mouse or keyboard, is marked with its row."""

from typing import Literal

from pydantic import Field, model_validator

from ....spec.document import Part
from ....spec.placement import Score, Scores
from ...pages.pareto import NAMES
from .figure import BLUE, ORANGE, Figure, View, axis

Moved = Literal["boundary_cross_host", "boundary_cross_device", "fanout_host", "fanout_device"]


class PrintedPoint(Part):
    """One placement of a front."""

    name: str
    cap: float | None
    on_front: bool
    scores: Scores


class PrintedFront(Part):
    """What ``planner.place.pareto.Front.to_dict`` gives, which ``moeplan place --pareto --json`` prints."""

    points: tuple[PrintedPoint, ...] = Field(min_length=1, max_length=1000)
    part: Literal["fit", "held_out"]
    host: Moved
    device: Moved
    dropped: int
    missed: tuple[float, ...]
    steps: int
    seconds: float

    @model_validator(mode="after")
    def _scored(self) -> "PrintedFront":
        for i, point in enumerate(self.points):
            score = getattr(point.scores, self.part)
            if score is None or getattr(score, self.host) is None or getattr(score, self.device) is None:
                raise ValueError(f"points[{i}].scores.{self.part}: {self.host} and {self.device} are missing")
        return self

    @property
    def scores(self) -> list[Score]:
        """Of every point, on the part that the front is drawn for."""
        return [getattr(point.scores, self.part) for point in self.points]


def front_figure(front: PrintedFront) -> Figure:
    """Balance along, what moves up."""
    part, crossing, scores = front.part, front.host.startswith("boundary"), front.scores
    balance = [round(score.balance_mean, 4) for score in scores]
    names = [NAMES.get(point.name, "") for point in front.points]
    fields = [("between devices" if crossing else "devices per token", front.device, BLUE, "circle")]
    if len({getattr(score, front.host) for score in scores}) > 1:
        fields.insert(0, ("between hosts" if crossing else "hosts per token", front.host, ORANGE, "diamond"))
    data = [
        {
            "type": "scatter",
            "mode": "markers+lines+text",
            "name": title,
            "x": balance,
            "y": [getattr(score, field) for score in scores],
            "text": [NAMES.get(p.name, "") if p.name in ("placement", "linear", "eplb") else "" for p in front.points],
            "textposition": "top center",
            "cliponaxis": False,
            "line": {"width": 1, "dash": "dot", "color": colour},
            "marker": {"size": 11, "color": colour, "symbol": symbol},
            "hovertemplate": f"balance %{{x:.3f}}<br>{title} %{{y:.3f}}<extra></extra>",
        }
        for title, field, colour, symbol in fields
    ]
    rows = [
        (
            i,
            name or "searched",
            "" if point.on_front else "beaten",
            x,
            *(round(getattr(score, f), 4) for _, f, _, _ in fields),
        )
        for i, (point, name, x, score) in enumerate(zip(front.points, names, balance, scores, strict=True), 1)
    ]
    where = "held-out" if part == "held_out" else "fitted"
    return Figure(
        "front",
        "What balance buys",
        f"{len(rows)} placements from the coolest to the one that moves least, scored on the {where} part of the trace."
        " Pick a point, or a row of the table.",
        ("number", "placement", "", "balance", *(title for title, *_ in fields)),
        [View("all", data, rows)],
        {
            "xaxis": axis("balance (hottest device over the ideal, mean over layers)"),
            "yaxis": axis("share of moves" if crossing else "places of a token's experts", rangemode="tozero"),
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
            "clickmode": "event+select",
        },
        picks=True,
    )

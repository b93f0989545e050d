"""What every figure is: data for Plotly, a sentence that says what it shows, and its numbers as a table.

Plotly reads a small part of HTML in every text that it draws. Names that come out of documents go through ``plain``,
so that they are drawn as they are. Tables are escaped by the templates.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ....spec.operators import PARTS

Cell = str | int | float
Row = Sequence[Cell]

# Okabe and Ito's colours, told apart with any colour vision; what is rare or short is grey.
ORANGE, SKY, GREEN, YELLOW = "#e69f00", "#56b4e9", "#009e73", "#f0e442"
BLUE, RED, PURPLE, GREY = "#0072b2", "#d55e00", "#cc79a7", "#8c8c8c"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, GREY)
PART_COLOURS = dict.fromkeys(PARTS, GREY) | {
    "attention": BLUE,
    "mixer": "#7a5195",
    "route": YELLOW,
    "dispatch": SKY,
    "gather": SKY,
    "expert": ORANGE,
    "shared": RED,
    "combine": PURPLE,
    "dense": GREEN,
}
AROUND_ONE = [[0.0, "#2166ac"], [0.25, "#92c5de"], [0.5, "#f7f7f7"], [0.75, "#f4a582"], [1.0, "#b2182b"]]
"""Blue below the middle, red above it: safe with any colour vision."""
SEQUENTIAL = "Cividis"
LONGEST = 60  # characters of a name
MOST_DEVICES = 512  # rows of a figure


@dataclass(frozen=True)
class View:
    """One of the pictures that a figure can show: Plotly's traces, and the rows of its table."""

    label: str
    data: Sequence[Mapping[str, Any]]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Figure:
    """name: of the element, letters and dashes. says: the text alternative. columns: of the table of every view.

    layout: of Plotly, for all views. chooses: what the views differ in, where there are several. height: in pixels.
    picks: whether a point stands for the row of its number, and is marked with it.
    """

    name: str
    title: str
    says: str
    columns: Sequence[str]
    views: Sequence[View]
    layout: Mapping[str, Any] = field(default_factory=dict)
    chooses: str = ""
    height: int = 360
    picks: bool = False

    def to_json(self) -> str:
        """What the script in the page reads, safe inside an element of HTML."""
        body = {
            "layout": {"height": self.height, **self.layout},
            "views": [{"data": view.data, "rows": view.rows} for view in self.views],
            "picks": self.picks,
        }
        return safe_json(body)


def safe_json(value: Any) -> str:
    """JSON without a sign that could end the element that it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def plain(name: str) -> str:
    """A name for Plotly to draw as it is: no tag, no control character, not too long."""
    shown = "".join(c if c.isprintable() else "?" for c in name)
    shown = shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."
    return html.escape(shown, quote=False).replace("%{", "%&#123;")


def readable(name: str) -> str:
    """A name for a table or a sentence, which the templates escape."""
    shown = "".join(c if c.isprintable() else "?" for c in name)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title that keeps its distance."""
    return {"title": {"text": title, "standoff": 8}, "automargin": True, **more}


def most_of(values: np.ndarray) -> list[int]:
    """[G] devices to show, in order: all, or of many those with the most."""
    order = np.argsort(-values, kind="stable")[:MOST_DEVICES]
    return sorted(order.tolist())


def left_out(shown: Sequence[int], devices: int) -> str:
    """What to say of devices that are not shown."""
    return f" The first {len(shown)} by this are here, of {devices:,} devices." if len(shown) < devices else ""


def rows_height(rows: int, each: int = 22, least: int = 220, most: int = 900) -> int:
    """Pixels of a figure with so many rows."""
    return max(least, min(most, 130 + each * rows))

"""The tables of ``docs/engines.md``, printed from ``families``.

Rewrite them with ``python -m moeplan.planner.export.tables docs/engines.md``.
"""

import sys
from pathlib import Path

from . import ENGINES
from .families import TABLE

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
DOES = {"yes": "writes it", "note": "writes it, with a note", "refuse": "refuses"}


def markdown() -> str:
    """One table per engine, a row per family."""
    parts = []
    for name, cells in TABLE.items():
        rows = [f"**{ENGINES[name].title} {ENGINES[name].version}**", ""]
        rows += ["| family | hook | loader | own balancer | `export` | source |", "|---|---|---|---|---|---|"]
        rows += [
            f"| {family} | {c.hook} | {c.loader} | {c.balancer} | {DOES[c.use]} | {c.source} |"
            for family, c in sorted(cells.items())
        ]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def in_document(text: str) -> str:
    """The document with the tables between their two marks."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{markdown()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(in_document(document.read_text(encoding="utf-8")), encoding="utf-8")

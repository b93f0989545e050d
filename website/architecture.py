"""The picture of the subpackages, drawn from what their files import: ``python -m moeplan.website.architecture``.

It draws the imports that there are, not those that are allowed; ``tests/test_imports.py`` keeps the first within the
second.
"""

import ast
from pathlib import Path

from .pages import ROOT

PICTURE = "docs/architecture.svg"
# Column (-1 left, 0 middle, 1 right) and row: a package stands above all that it imports.
PLACES = {
    "service": (0, 0),
    "profiler": (-1, 1),
    "planner": (1, 1),
    "runtime": (-1, 2),
    "solvers": (1, 2),
    "spec": (0, 3),
}
WHAT = {
    "service": "command line, Python functions",
    "profiler": "measures devices, links, routing",
    "planner": "costs, simulator, search, exports",
    "runtime": "kernels, strategies, launchers",
    "solvers": "optimisation over arrays",
    "spec": "the documents, the catalogue",
}
WIDE, HIGH, AISLE, GAP, MARGIN = 230, 56, 170, 64, 16
STYLE = """\
<style>
rect { fill: #eef2fb; stroke: #4051b5; stroke-width: 1.5 }
text { font-family: sans-serif; font-size: 13px; fill: #1c2333; text-anchor: middle }
.name { font-size: 16px; font-weight: bold }
path { fill: none; stroke: #5b6477; stroke-width: 1.5; marker-end: url(#tip) }
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="9" markerHeight="9" orient="auto">
<polygon points="0,0 8,4 0,8" fill="#5b6477"/></marker></defs>"""


def imports(root: Path = ROOT) -> set[tuple[str, str]]:
    """(package, package that it imports), for every pair of packages."""
    found = set()
    for package in WHAT:
        for path in (root / package).rglob("*.py"):
            depth = len(path.relative_to(root).parts)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == depth:
                    names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
                    found |= {(package, name) for name in names if name in WHAT}
    return found


def picture(edges: set[tuple[str, str]]) -> str:
    """SVG: a box for each package, an arrow from each to what it imports."""
    width, height = 2 * WIDE + AISLE + 2 * MARGIN, 4 * HIGH + 3 * GAP + 2 * MARGIN
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">', STYLE]
    for package, imported in sorted(edges):
        (x, y), (to_x, to_y) = _way(PLACES[package], PLACES[imported])
        lines.append(f'<path d="M{x},{y} L{to_x},{to_y}"/>')
    for package, place in PLACES.items():
        x, y = _middle(place)
        lines.append(f'<rect x="{x - WIDE // 2}" y="{y}" width="{WIDE}" height="{HIGH}" rx="6"/>')
        lines.append(f'<text class="name" x="{x}" y="{y + 23}">{package}/</text>')
        lines.append(f'<text x="{x}" y="{y + 43}">{WHAT[package]}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _middle(place: tuple[int, int]) -> tuple[int, int]:
    """The middle of a box's upper side."""
    column, row = place
    return MARGIN + WIDE + AISLE // 2 + column * (WIDE + AISLE) // 2, MARGIN + row * (HIGH + GAP)


def _way(start: tuple[int, int], end: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where an arrow begins and ends: down to the next row, or through the aisle between the columns."""
    (x, y), (to_x, to_y) = _middle(start), _middle(end)
    if start[1] >= end[1]:
        raise ValueError("a package imports one that is not below it: change PLACES")
    towards = end[0] - start[0]
    if end[1] == start[1] + 1:
        return (x + towards * WIDE // 4, y + HIGH), (to_x - towards * WIDE // 4, to_y)
    begin = (x + towards * AISLE // 8, y + HIGH) if start[0] == 0 else (x + towards * WIDE // 2, y + HIGH // 2)
    return begin, (
        (to_x - towards * AISLE // 4, to_y) if end[0] == 0 else (to_x - towards * WIDE // 2, to_y + HIGH // 2)
    )


if __name__ == "__main__":
    (ROOT / PICTURE).write_text(picture(imports()))

"""The table that the script prints last, and the page for benchmarks/results."""

from collections.abc import Sequence
from datetime import date

from moeplan.benchmarks.gpu.stage import Row

HEAD = ("stage", "what", "figure", "wanted", "")
WIDEST = (14, 44, 62, 24, 12)

HOW = """Where a GPU is at hand: `python benchmarks/gpu/wheels.py` here (a machine without a network takes the wheels in
`build/gpu-wheels` along with the tree), `benchmarks/gpu/run.sh --out FOLDER` there, and `bring_home.py FOLDER` here,
which puts the figures on this page, the cluster beside it and the tuned configurations into the package.
"""


def table(rows: Sequence[Row]) -> str:
    """Aligned columns without the details; short enough to be the end of a log."""
    cells = [HEAD, *(_cells(row) for row in rows if not row.detail)]
    widths = [min(max(len(line[i]) for line in cells), WIDEST[i]) for i in range(len(HEAD))]
    lines = ["  ".join(cell[:w].ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def page(rows: Sequence[Row], dry: bool, command: str) -> str:
    """Markdown: date, command, all rows."""
    title = "# On a GPU\n\n"
    if dry:
        title += (
            "**This has not run on a GPU yet.** Below is a dry run, on a processor: Triton's interpreter, small sizes, "
            "a stand-in for NVML. It shows that the script runs and that results are right; its times mean nothing.\n\n"
        )
    lines = [f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in _cells(row))} |" for row in rows]
    return f"{title}{date.today()}. Command: `{command}`.\n\n{HOW}\n" + "\n".join(lines) + "\n"


def _cells(row: Row) -> tuple[str, ...]:
    return row.stage, row.what, row.figure, row.want, row.verdict

"""The tables of the command line's pages, as rows that templates show."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """numbers: columns that are set to the right; marked: rows that stand out."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    marked: frozenset[int] = frozenset()
    caption: str = ""


def from_rich(table: "RichTable") -> Table:
    """The same table; bold rows are marked."""
    columns = [list(column.cells) for column in table.columns]
    return Table(
        title=str(table.title or ""),
        columns=[str(column.header) for column in table.columns],
        rows=[[_readable(str(cell)) for cell in row] for row in zip(*columns, strict=True)],
        numbers=frozenset(i for i, column in enumerate(table.columns) if column.justify == "right"),
        marked=frozenset(i for i, row in enumerate(table.rows) if "bold" in str(row.style or "")),
        caption=str(table.caption or ""),
    )


def _readable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)

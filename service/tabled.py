"""Measured tables for the commands that need them, with a name for documents."""

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..spec.tabled import Tables


@dataclass(frozen=True)
class Source:
    """name: which tables, with their version."""

    tables: Tables
    name: str


def tables_of(folder: Path | None) -> Source:
    """The tables of a folder, or of the extra ``silicon``. Raises MoeplanError."""
    from ..profiler.silicon.audited import open_tables

    opened = open_tables(folder)
    if folder is not None:
        return Source(opened, f"folder {folder.name}"[:300])
    try:
        return Source(opened, f"aiconfigurator-core {version('aiconfigurator-core')}")
    except PackageNotFoundError:  # the files are there all the same
        return Source(opened, "aiconfigurator-core")

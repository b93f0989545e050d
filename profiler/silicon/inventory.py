"""What a collection of tables holds of one type of GPU: operators, engines, versions, rows."""

from collections import Counter
from dataclasses import dataclass

from .files import count_rows
from .layouts import LAYOUTS
from .tables import MeasuredTables, version_key


@dataclass(frozen=True)
class Held:
    """One operator under one version of one engine. ``rows``: as they stand in its files, repeats included."""

    operator: str
    engine: str
    version: str
    rows: int


def list_held(tables: MeasuredTables, system: str) -> tuple[Held, ...]:
    """By operator and engine, the newest version first; reads the ends of files only."""
    operators = {layout.file: layout.operator for layout in LAYOUTS}
    rows: Counter[tuple[str, str, str]] = Counter()
    for place in tables.places(system):
        rows[operators[place.kind], place.engine, place.version] += count_rows(place.path)
    held = [Held(*key, count) for key, count in rows.items()]
    held.sort(key=lambda one: version_key(one.version, tables.root), reverse=True)
    return tuple(sorted(held, key=lambda one: (one.operator, one.engine)))

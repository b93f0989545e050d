"""Tables that can be planned with: what the auditor condemns is replaced, what was never measured is scaled."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ...spec.errors import MoeplanError
from ...spec.tabled import Origin, System, Table
from .audit import Fault, Judge, Judged
from .files import find_root
from .roofline import COUNTED
from .scale import can_scale, nearest_systems, scale_table
from .tables import MeasuredTables, curve_columns, newest_curves

if TYPE_CHECKING:
    import pandas as pd


def open_tables(folder: str | Path | None = None, strict: bool = False) -> "AuditedTables":
    """The tables of a folder, or of the installed package of the extra ``silicon``.

    ``strict``: refuses what is scaled, and what is wrong and cannot be replaced. Raises MoeplanError.
    """
    return AuditedTables(MeasuredTables(find_root(folder)), strict)


@dataclass(frozen=True)
class AuditedTables:
    """A ``spec.tabled.Tables`` over measured ones."""

    measured: MeasuredTables
    strict: bool = False

    @cached_property
    def _judged(self) -> dict[tuple[str, str, str, str], Judged]:
        return {}

    @cached_property
    def _tables(self) -> dict[tuple[str, str, str, str | None], Table]:
        return {}

    def systems(self) -> tuple[str, ...]:
        return self.measured.systems()

    def system(self, name: str) -> System:
        measured = self.measured
        return measured.system(name)

    def engines(self, system: str) -> tuple[str, ...]:
        return self.measured.engines(system)

    def operators(self, system: str, engine: str) -> tuple[str, ...]:
        return self.measured.operators(system, engine)

    def table(self, operator: str, system: str, engine: str, version: str | None = None) -> Table:
        """Scaled from the nearest GPU type where this engine has no table of the operator on this one."""
        key = (operator, system, engine, version)
        if key not in self._tables:
            known = self.measured.versions(operator, system, engine)
            self._tables[key] = self._mended(*key) if known else self._scaled(*key)
        return self._tables[key]

    def judged(self, operator: str, system: str, engine: str, version: str) -> Judged:
        """One file, as the auditor left it."""
        key = (operator, system, engine, version)
        if key not in self._judged:
            labels = [
                (other, one)
                for other in self.engines(system)
                for one in self.measured.versions(operator, system, other)
                if (other, one) != (engine, version)
            ]
            judge = Judge(operator, self.system(system))
            counted = operator in COUNTED
            others = [self.measured.table(operator, system, *label).frame for label in labels] if counted else []
            frame = self.measured.table(operator, system, engine, version).frame
            self._judged[key] = judge.judge(frame, engine, version, others)
        return self._judged[key]

    def faults(self, system: str) -> Iterator[tuple[str, tuple[Fault, ...]]]:
        """Of every file that can be judged on a GPU type: what it is called, and what is wrong with it."""
        for operator in COUNTED:
            for engine in self.engines(system):
                for version in self.measured.versions(operator, system, engine):
                    yield (
                        f"{operator} of {engine} {version}",
                        self.judged(operator, system, engine, version).faults,
                    )

    def instead(self, fault: Fault) -> str:
        """What stands in the place of a condemned part: engines and versions, or that nothing does."""
        frame = self.table(fault.operator, fault.system, fault.engine).frame
        rows = frame[(frame["dtype"] == fault.dtype) & (frame["origin"] == "replaced")]
        return _sources(rows)

    def forget(self) -> None:
        """Frees what is kept in memory."""
        self._judged.clear()
        self._tables.clear()
        self.measured.forget()

    def _mended(self, operator: str, system: str, engine: str, version: str | None) -> Table:
        import pandas as pd

        raw = self.measured.table(operator, system, engine, version)
        versions = self.measured.versions(operator, system, engine)
        wanted = versions if version is None else (version,)
        judged = {one: self.judged(operator, system, engine, one) for one in versions}
        good = newest_curves([judged[one].good for one in wanted], operator)
        bad = newest_curves([judged[one].condemned for one in wanted], operator)
        if bad.empty:
            return Table(operator, system, engine, raw.version, good, raw.origin)
        faults = [fault for one in wanted for fault in judged[one].faults if fault.condemned]
        parts = [good]
        for dtype in sorted(bad["dtype"].unique()):
            parts += self._replacement(operator, system, engine, bad[bad["dtype"] == dtype], good)
        frame = pd.concat(parts, ignore_index=True)
        dtypes = {fault.dtype for fault in faults}
        moved = frame["dtype"].isin(dtypes) & ~frame["source"].isin([f"{f.engine} {f.version}" for f in faults])
        frame.loc[moved, "origin"] = "replaced"
        return self._told(Table(operator, system, engine, raw.version, frame, raw.origin), bad, faults)

    def _told(self, table: Table, bad: "pd.DataFrame", faults: list[Fault]) -> Table:
        """The table, with a sentence on what was replaced by what."""
        texts, kept = [], False
        for fault in faults:
            rows = table.frame[(table.frame["dtype"] == fault.dtype) & (table.frame["origin"] == "replaced")]
            lost = rows.empty and fault.dtype in set(bad["dtype"])
            kept |= lost
            what = f"{fault.dtype} of {fault.engine} {fault.version} ({fault.check}: {fault.text})"
            texts.append(f"{what} replaced by {_sources(rows)}")
        if self.strict and kept:
            raise MoeplanError(f"{table.operator} of {table.engine} on {table.system}: {'; '.join(texts)}")
        text = f"{table.origin.text}; {'; '.join(texts)}"
        return Table(table.operator, table.system, table.engine, table.version, table.frame, Origin("replaced", text))

    def _replacement(
        self, operator: str, system: str, engine: str, bad: "pd.DataFrame", good: "pd.DataFrame"
    ) -> list["pd.DataFrame"]:
        """Rows in the place of condemned ones of one type: other versions first, then the engine that has most curves.

        The condemned rows themselves where there is nothing else.
        """
        dtype = bad["dtype"].iloc[0]
        own = self.measured.versions(operator, system, engine)
        choices = [[self.judged(operator, system, engine, one).good for one in own]]
        for other in self.engines(system):
            if other != engine:
                theirs = self.measured.versions(operator, system, other)
                choices.append([self.judged(operator, system, other, one).good for one in theirs])
        columns = curve_columns(bad, operator)
        wanted = bad[columns].drop_duplicates()
        found: list[tuple[int, pd.DataFrame]] = []
        for frames in choices:
            usable = [frame[frame["dtype"] == dtype] for frame in frames]
            usable = [frame for frame in usable if len(frame)]
            if usable:
                rows = newest_curves([good[good["dtype"] == dtype].iloc[:0], *usable], operator)
                on = [name for name in columns if name in rows]
                found.append((len(wanted.merge(rows[on].drop_duplicates(), on=on)), rows))
        if not found:
            return [] if (good["dtype"] == dtype).any() else [bad]
        first = found[0][1] if set(found[0][1]["source"]) <= {f"{engine} {one}" for one in own} else None
        best = max(found, key=lambda one: one[0])[1]
        frames = [good[good["dtype"] == dtype], *([] if first is None else [first]), best]
        return [newest_curves(frames, operator).iloc[len(frames[0]) :]]

    def _scaled(self, operator: str, system: str, engine: str, version: str | None) -> Table:
        target = self.system(system)
        sources = [
            self.system(name)
            for name in self.systems()
            if name != system and self.measured.versions(operator, name, engine)
        ]
        if self.strict or version is not None or not can_scale(operator) or not sources:
            self.measured.table(operator, system, engine, version)  # says what there is
        source = nearest_systems(target, sources, operator)[0]
        return scale_table(self.table(operator, source.name, engine), source, target)


def _sources(rows: "pd.DataFrame") -> str:
    return " and ".join(sorted(rows["source"].unique())) or "nothing: there is no other table of it"

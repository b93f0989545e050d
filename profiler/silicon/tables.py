"""All tables of one folder as they stand in its files, read when they are asked for."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import InvalidVersion, Version

from ...spec.errors import DocumentError, MoeplanError
from ...spec.tabled import Origin, System, Table
from ...spec.texts import show
from .files import Place, list_places
from .frames import read_frame
from .layouts import LAYOUTS, Layout
from .sheets import list_sheets, read_sheet

if TYPE_CHECKING:
    import pandas as pd

KEPT = 64  # frames in memory at once: at most some 100,000 rows each


@dataclass(frozen=True)
class MeasuredTables:
    """What was measured, as it stands in the files: a ``spec.tabled.Tables``.

    ``root``: the folder ``systems``. Nothing is read before it is asked for.
    """

    root: Path

    @cached_property
    def _frames(self):
        return lru_cache(maxsize=KEPT)(self._read)

    @cached_property
    def _places(self) -> dict[str, tuple[Place, ...]]:
        return {}

    @cached_property
    def _names(self) -> tuple[str, ...]:
        names = list_sheets(self.root)
        if not names:
            raise DocumentError(f"{self.root}: no data sheet (<gpu>.yaml) of any GPU type")
        return names

    def systems(self) -> tuple[str, ...]:
        return self._names

    def system(self, name: str) -> System:
        return read_sheet(self.root, self._known(name))

    def engines(self, system: str) -> tuple[str, ...]:
        return tuple(sorted({place.engine for place in self.places(system)}))

    def operators(self, system: str, engine: str) -> tuple[str, ...]:
        kinds = {place.kind for place in self.places(system) if place.engine == engine}
        return tuple(sorted({layout.operator for layout in LAYOUTS if layout.file in kinds}))

    def versions(self, operator: str, system: str, engine: str) -> tuple[str, ...]:
        """Versions of an engine that have a table of this operator, newest first."""
        kinds = {layout.file for layout in layouts_of(operator)}
        found = {place.version for place in self.places(system) if place.engine == engine and place.kind in kinds}
        return tuple(sorted(found, key=lambda text: version_key(text, self.root), reverse=True))

    def places(self, system: str) -> tuple[Place, ...]:
        """The files of one GPU type."""
        self._known(system)
        if system not in self._places:
            self._places[system] = list_places(self.root, system)
        return self._places[system]

    def table(self, operator: str, system: str, engine: str, version: str | None = None) -> Table:
        versions = self.versions(operator, system, engine)
        if not versions:
            raise self._missing(operator, system, engine)
        if version is not None and version not in versions:
            raise MoeplanError(
                f"{operator} of {engine} {version} on {system}: no such table; there are those of {', '.join(versions)}"
            )
        wanted = versions if version is None else (version,)
        frame = newest_curves([self._frames(operator, system, engine, one) for one in wanted], operator)
        text = f"measured on {system} under {engine} {', '.join(wanted)}"
        return Table(operator, system, engine, wanted[0], frame, Origin("measured", text))

    def forget(self) -> None:
        """Frees the frames in memory."""
        self._frames.cache_clear()

    def _read(self, operator: str, system: str, engine: str, version: str) -> "pd.DataFrame":
        import pandas as pd

        frames = []
        for layout in layouts_of(operator):
            for place in self.places(system):
                if (place.kind, place.engine, place.version) == (layout.file, engine, version):
                    frames.append(self._completed(read_frame(place.path, layout), operator, system))
        frame = pd.concat(frames, ignore_index=True)
        return frame.assign(source=f"{engine} {version}", origin="measured")

    def _completed(self, frame: "pd.DataFrame", operator: str, system: str) -> "pd.DataFrame":
        """Files of the exchange of tokens have the number of GPUs or of nodes: whole nodes take part."""
        if operator != "moe_alltoall":
            return frame
        per_node = self.system(system).gpus_per_node
        missing: dict[str, Any] = {"routing": "", "sms": 0}
        if "ep" not in frame:
            missing["ep"] = frame["nodes"] * per_node
        elif "nodes" not in frame:
            missing["nodes"] = -(-frame["ep"] // per_node)
        return frame.assign(**{name: value for name, value in missing.items() if name not in frame})

    def _known(self, name: str) -> str:
        if name not in self._names:
            raise MoeplanError(f"GPU type {show(name)}: not known; {nearest(name, self._names)}")
        return name

    def _missing(self, operator: str, system: str, engine: str) -> MoeplanError:
        layouts_of(operator)
        engines = [name for name in self.engines(system) if self.versions(operator, system, name)]
        if engines:
            return MoeplanError(f"{operator} of {engine} on {system}: no such table; {' and '.join(engines)} have one")
        others = [name for name in self.systems() if any(self.versions(operator, name, e) for e in self.engines(name))]
        there = f"; there is one of {', '.join(others)}" if others else ""
        return MoeplanError(f"{operator} on {system}: no engine has a table{there}")


def layouts_of(operator: str) -> tuple[Layout, ...]:
    """The kinds of files that hold an operator. Raises MoeplanError for an unknown one."""
    found = tuple(layout for layout in LAYOUTS if layout.operator == operator)
    if not found:
        known = sorted({layout.operator for layout in LAYOUTS})
        raise MoeplanError(f"operator {show(operator)}: not known; {nearest(operator, known)}")
    return found


def curve_columns(frame: "pd.DataFrame", operator: str) -> list[str]:
    """The columns that name a curve: all but those along which it runs, what computed it and where it is from."""
    axes = {name for layout in layouts_of(operator) for name in layout.axes}
    return [name for name in frame.columns if name not in axes | {"kernel", "seconds", "source", "origin"}]


def newest_curves(frames: list["pd.DataFrame"], operator: str) -> "pd.DataFrame":
    """Every curve once, whole, from the first frame that has it: versions are not mixed within one."""
    import pandas as pd

    if len(frames) == 1:
        return frames[0]
    columns = [name for name in curve_columns(frames[0], operator) if all(name in frame for frame in frames)]
    kept = [frames[0]]
    seen = frames[0][columns].drop_duplicates()
    for frame in frames[1:]:
        known = frame[columns].merge(seen, how="left", on=columns, indicator=True)["_merge"].eq("both").to_numpy()
        if not known.all():
            kept.append(frame[~known])
            seen = pd.concat([seen, frame.loc[~known, columns].drop_duplicates()])
    return pd.concat(kept, ignore_index=True)


def version_key(text: str, where: Path) -> Version:
    """Orders versions as their engines do: a release after its candidates."""
    try:
        return Version(text)
    except InvalidVersion:
        raise DocumentError(f"{where}: a folder {show(text)} where the version of an engine is expected") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names that look most like one that is not; all of them where none does."""
    known = tuple(known)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    near += [one for one in known if name and name.lower() in one and one not in near]
    return f"nearest: {', '.join(near[:4])}" if near else f"there are {', '.join(known)}"

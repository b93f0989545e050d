"""New recordings of an engine in a folder, each read once, when it has stopped growing.

A recording is a file (SGLang, vLLM) or a folder of files (ranks of one recording; TensorRT-LLM's statistics). It is
read when two looks in a row found the same size and time of change. What cannot be read is told once, and tried again
only if it changes: a slow writer may have paused. What vanishes meanwhile is forgotten. Ranks that hold the same
counts, one file each, count once.
"""

# L layers, E experts

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...spec.errors import DocumentError, MoeplanError
from ...spec.texts import show
from ...spec.trace import Trace
from .importers import import_trace

SUFFIXES = frozenset({".pt", ".pth", ".json", ".jsonl", ".npz", ".npy", ".safetensors"})
UNFINISHED = (".tmp", ".part", ".partial", ".swp")  # names that writers give to what is not complete
STATISTICS = "meta_info.json"  # in every recording of TensorRT-LLM
MOST_ENTRIES = 100_000  # of the folder, and of one recording
MOST_READ = 256  # recordings in one look; the others wait for the next
PARTS = 8  # of a recording that is told token by token, each a batch of its own
REMEMBERED = 256  # recordings whose counts are compared with new ones

Mark = tuple[int, int, int]
"""Number of files, bytes, time of the last change in nanoseconds."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """A recording: its name, when it was written (seconds since 1970), and its parts, counts [L, E] each."""

    name: str
    when: float
    counts: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Refused:
    """What is no recording, or none of this model, and why; one line."""

    name: str
    why: str


@dataclass
class Follower:
    """A folder that is looked at again and again. ``kind``: one of IMPORTERS; without it, by content.

    shape: layers and experts that a recording must have. read, refused: by name, as they were then. counted: digests of
    the counts that were read last. A restart needs these three.
    """

    path: Path
    kind: str | None
    shape: tuple[int, int]
    read: dict[str, Mark] = field(default_factory=dict)
    refused: dict[str, Mark] = field(default_factory=dict)
    counted: list[str] = field(default_factory=list)
    growing: dict[str, Mark] = field(default_factory=dict)

    def look(self) -> Iterator[Recorded | Refused]:
        """What is complete since the last look, oldest first. Raises DocumentError where the folder cannot be read."""
        marks = self._marks()
        self.read = {name: mark for name, mark in self.read.items() if name in marks}
        self.refused = {name: mark for name, mark in self.refused.items() if name in marks}
        new = {n: mark for n, mark in marks.items() if mark not in (self.read.get(n), self.refused.get(n))}
        ready = sorted((n for n in new if self.growing.get(n) == new[n]), key=lambda n: (new[n][2], n))[:MOST_READ]
        self.growing = {name: mark for name, mark in new.items() if name not in set(ready)}
        for name in ready:
            found = self._read(name, new[name])
            if isinstance(found, Recorded):
                self.read[name] = new[name]
            elif found is not None:
                self.refused[name] = new[name]
            if found is not None:
                yield found

    @property
    def waiting(self) -> bool:
        """Whether something was seen that has not been read: it grows, or there was too much of it."""
        return bool(self.growing)

    def _marks(self) -> dict[str, Mark]:
        """Of everything in the folder but what its writers hide."""
        try:
            with os.scandir(self.path) as entries:
                names = [entry.name for entry, _ in zip(entries, range(MOST_ENTRIES + 1), strict=False)]
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise DocumentError(f"{show(str(self.path))}: cannot be read ({reason})") from None
        if len(names) > MOST_ENTRIES:
            raise DocumentError(f"{self.path}: more than {MOST_ENTRIES:,} files: move old recordings away")
        if STATISTICS in names:
            raise DocumentError(
                f"{self.path}: is one recording of TensorRT-LLM ({STATISTICS}); name the folder that recordings are "
                "made in"
            )
        visible = [name for name in names if not name.startswith(".") and not name.endswith(UNFINISHED)]
        marks = {name: _mark(self.path / name) for name in visible}
        return {name: mark for name, mark in marks.items() if mark is not None}

    def _read(self, name: str, mark: Mark) -> Recorded | Refused | None:
        """What it holds; None where it vanished."""
        path, shown = self.path / name, show(name)
        if name in self.read:
            return Refused(name, f"{shown}: changed after it was read; its new content is left out")
        try:
            if not path.is_dir() and path.suffix not in SUFFIXES:
                return Refused(name, f"{shown}: no recording, left out (one ends in {', '.join(sorted(SUFFIXES))})")
            trace, _ = import_trace(path, self.kind)
        except MoeplanError as error:
            return None if _mark(path) is None else Refused(name, str(error))
        if (trace.layers, trace.num_experts) != self.shape:
            return Refused(
                name,
                f"{shown}: {trace.layers} layers x {trace.num_experts} experts, left out: the placement has "
                f"{self.shape[0]} x {self.shape[1]}",
            )
        digest = hashlib.sha256(np.ascontiguousarray(trace.expert_counts).tobytes()).hexdigest()[:16]
        if digest in self.counted:
            return Refused(name, f"{shown}: the same counts as a recording before it (another rank's): counted once")
        self.counted = [*self.counted[1 - REMEMBERED :], digest]
        return Recorded(name, min(mark[2] / 1e9, time.time()), _parts(trace))


def _mark(path: Path) -> Mark | None:
    """None for what is not there, or cannot be looked at."""
    try:
        found = path.stat()
        if not stat.S_ISDIR(found.st_mode):
            return 1, found.st_size, found.st_mtime_ns
        with os.scandir(path) as entries:
            inside = [entry.stat() for entry, _ in zip(entries, range(MOST_ENTRIES), strict=False)]
    except (OSError, ValueError):
        return None
    changed = max([found.st_mtime_ns, *(each.st_mtime_ns for each in inside)])
    return len(inside), sum(each.st_size for each in inside), changed


def _parts(trace: Trace) -> tuple[np.ndarray, ...]:
    """[L, E] each: where tokens are told one by one, equal parts; else the counts, which may be of any length."""
    if trace.counts_only or trace.zero_experts:
        return (trace.expert_counts,)
    return tuple(part.expert_counts for part in trace.parts(PARTS))

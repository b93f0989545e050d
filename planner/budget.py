"""The wall clock of one command: everything, from reading its input to writing its answer, ends by one deadline.

Work is counted in steps, so that equal commands give equal answers; the clock only cuts. Each stage gets a part of what
is left (``part``) and keeps free what those after it need (``before``). What cannot end in time is left out, in words
(``skip``), and the answer says so.
"""

import time
from dataclasses import dataclass, field

ROOM = 1.3  # times what a stage took the last time: a busy machine is not equally busy


class OutOfTime(Exception):
    """A stage met its deadline; what it was busy with. Whoever gave the deadline says what is used instead."""


@dataclass
class Budget:
    """began, deadline: ``time.perf_counter()``; skipped: what was left out, in words, each once."""

    began: float
    deadline: float
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, seconds: float, began: float | None = None) -> "Budget":
        """So many seconds from ``began``, by default from now."""
        start = time.perf_counter() if began is None else began
        return cls(start, start + seconds)

    @property
    def left(self) -> float:
        """Seconds, at least 0."""
        return max(self.deadline - time.perf_counter(), 0.0)

    @property
    def late(self) -> bool:
        return time.perf_counter() >= self.deadline

    def part(self, fraction: float) -> "Budget":
        """A fraction of what is left, from now."""
        return Budget(self.began, time.perf_counter() + fraction * self.left, self.skipped)

    def before(self, seconds: float) -> "Budget":
        """The same, with so many seconds kept free at its end."""
        return Budget(self.began, self.deadline - seconds, self.skipped)

    def affords(self, seconds: float, what: str) -> bool:
        """Whether a stage that took so many seconds before, or should take them, ends in time; else it is skipped."""
        if ROOM * seconds <= self.left:
            return True
        self.skip(what)
        return False

    def skip(self, what: str) -> None:
        """Note what there was no time for."""
        if what not in self.skipped:
            self.skipped.append(what)

    @property
    def slowdown(self) -> float:
        """Wall seconds so far per second of this process' processor time: how much others claim; at least 1."""
        return max((time.perf_counter() - self.began) / max(time.process_time(), 1e-3), 1.0)

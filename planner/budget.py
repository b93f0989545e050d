"""The wall clock of one command: everything, from reading its input to writing its answer, ends by one deadline.

What ends a search early and what hears of its progress go with it, so that one argument reaches every stage.

Work is counted in steps, so that equal commands give equal answers; the clock only cuts. Each stage gets a part of what
is left (``part``) and keeps free what those after it need (``before``). What cannot end in time is left
out (``skip``), and the answer names it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from threading import Event
from typing import Any

SAFETY_FACTOR = 1.3  # times what a stage took the last time: a busy machine is not equally busy


class OutOfTime(Exception):
    """A stage met its deadline; what it was busy with. Whoever gave the deadline says what is used instead."""


@dataclass
class Budget:
    """began, deadline: ``time.perf_counter()``; skipped: what was left out, as text, each once.

    stop: set when the user wants what is found by then. on_event: hears of progress, as dicts with ``done``, ``of`` and
    ``what``. Parts share all three.
    """

    began: float
    deadline: float
    skipped: list[str] = field(default_factory=list)
    stop: Event = field(default_factory=Event)
    on_event: Callable[[dict[str, Any]], None] | None = None

    @classmethod
    def of(
        cls,
        seconds: float,
        began: float | None = None,
        *,
        stop: Event | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> "Budget":
        """So many seconds from ``began``, by default from now."""
        start = time.perf_counter() if began is None else began
        return cls(start, start + seconds, stop=stop or Event(), on_event=on_event)

    @property
    def left(self) -> float:
        """Seconds, at least 0."""
        return max(self.deadline - time.perf_counter(), 0.0)

    @property
    def late(self) -> bool:
        return time.perf_counter() >= self.deadline

    def part(self, fraction: float) -> "Budget":
        """A fraction of what is left, from now."""
        return replace(self, deadline=time.perf_counter() + fraction * self.left)

    def before(self, seconds: float) -> "Budget":
        """The same, with so many seconds kept free at its end."""
        return replace(self, deadline=self.deadline - seconds)

    def at_least(self, seconds: float) -> "Budget":
        """The same, or so many seconds from now where less is left."""
        return replace(self, deadline=max(self.deadline, time.perf_counter() + seconds))

    def affords(self, seconds: float, what: str) -> bool:
        """Whether a stage that took so many seconds before, or should take them, ends in time; else it is skipped."""
        if SAFETY_FACTOR * seconds <= self.left:
            return True
        self.skip(what)
        return False

    @property
    def stopped(self) -> bool:
        """Whether the user wants what is found by now."""
        return self.stop.is_set()

    @property
    def over(self) -> bool:
        """Whether the search ends here, late or stopped."""
        return self.late or self.stopped

    def tell(self, **event: Any) -> None:
        """Report progress."""
        if self.on_event:
            self.on_event(event)

    def skip(self, what: str) -> None:
        """Note what there was no time for."""
        if what not in self.skipped:
            self.skipped.append(what)

    @property
    def slowdown(self) -> float:
        """Wall seconds so far per second of this process' processor time: how much others claim; at least 1."""
        return max((time.perf_counter() - self.began) / max(time.process_time(), 1e-3), 1.0)

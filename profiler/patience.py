"""Waiting until other programs leave the ranks' processors alone, within a number of seconds."""

import time
from collections.abc import Callable

from ..runtime.load import LoadMeter, Program, named

WINDOW = 0.1  # seconds that a look at the machine takes: ten ticks of the kernel's clock
QUIET = 0.15  # of the processors' time: one tick of ten is the kernel's own housekeeping
NAMES = 10  # looks from one that finds out who it is to the next


class Patience:
    """``wait`` sleeps until no rank's processors are busy; in all for ``seconds``, the same on all ranks.

    agree: the largest value of all ranks. say: told, now and then, who is being waited for.
    """

    def __init__(
        self,
        meter: LoadMeter | None,
        agree: Callable[[float], float],
        seconds: float,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._meter, self._agree, self._say, self.left = meter, agree, say, seconds
        self.waited = 0.0

    def wait(self) -> bool:
        """Whether the machine is quiet now; False at once where no time is left to find out."""
        looks = 0
        while self.left > 0 and self._meter is not None:
            begin, before = time.perf_counter(), self._meter.read()
            speak, looks = looks % NAMES == 1, looks + 1
            programs = self._look(self._meter, speak)
            taken = self._meter.since(before).taken
            self._meter.leave_out(before)
            worst = self._agree(taken)
            elapsed = self._agree(time.perf_counter() - begin)
            self.left, self.waited = self.left - elapsed, self.waited + elapsed
            if worst < QUIET:
                return True
            if speak:
                self._say(f"waiting for {named(programs) if taken >= QUIET else 'other programs on another host'}")
        return False

    def _look(self, meter: LoadMeter, names: bool) -> list[Program]:
        if names:
            return meter.programs(WINDOW)
        time.sleep(WINDOW)
        return []


IMPATIENT = Patience(None, float, 0.0)
"""Does not look and does not wait."""

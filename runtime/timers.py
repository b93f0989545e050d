"""Where a step's time goes: every moment belongs to one part of one layer."""

from time import perf_counter

import torch

from ..spec.operators import Part

OUTSIDE = -1  # the layer of what stands outside the layers


class Timers:
    """Laps: ``lap(layer, part)`` books the time since the previous lap (or ``start``).

    On CUDA laps are events on the current stream, so nothing is synchronised within a step.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[int, Part, float | torch.cuda.Event]] = []
        self._begin: float | torch.cuda.Event = 0.0

    def _now(self) -> "float | torch.cuda.Event":
        if not self._cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._marks.clear()
        self._begin = self._now()

    def lap(self, layer: int, part: Part) -> None:
        self._marks.append((layer, part, self._now()))

    def seconds(self) -> dict[tuple[int, Part], float]:
        """Seconds of every (layer, part) since ``start``; their sum is the time from ``start`` to the last lap."""
        total: dict[tuple[int, Part], float] = {}
        for layer, part, begin, end in self.laps():
            total[layer, part] = total.get((layer, part), 0.0) + end - begin
        return total

    def laps(self) -> list[tuple[int, Part, float, float]]:
        """(layer, part, begin, end) of every lap, in seconds since ``start``."""
        if self._cuda:
            torch.cuda.synchronize()
        found, before, passed = [], self._begin, 0.0
        for layer, part, now in self._marks:
            spent = now - before if isinstance(now, float) else before.elapsed_time(now) / 1e3  # type: ignore[operator,union-attr]
            found.append((layer, part, passed, passed + spent))
            before, passed = now, passed + spent
        return found

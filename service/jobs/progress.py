"""How far a job is, as watchers see it: the last event, and a curve of incumbent and bound of limited length."""

import math
import time
from typing import Any

MOST_POINTS = 400
_TEXT = 200


class Progress:
    """Takes the events of one run. ``body``: seconds, points, and if known done, of, what, incumbent, bound, gap.

    points: [seconds, incumbent, bound], a null for what is not known; of too many every second one is left out.
    """

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._last: dict[str, Any] = {}
        self._points: list[list[float | None]] = []

    def take(self, event: dict[str, Any]) -> None:
        """What is no number, or no short text, is left out."""
        for name in ("done", "of", "incumbent", "bound", "gap"):
            value = event.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                self._last[name] = value
        if "what" in event:
            self._last["what"] = str(event["what"])[:_TEXT]
        known = [self._last.get("incumbent"), self._last.get("bound")]
        if known != [None, None] and (not self._points or self._points[-1][1:] != known):
            self._points.append([round(time.monotonic() - self._began, 3), *known])
            if len(self._points) > MOST_POINTS:
                del self._points[1:-1:2]

    @property
    def body(self) -> dict[str, Any]:
        seconds = round(time.monotonic() - self._began, 3)
        return self._last | {"seconds": seconds, "points": self._points}

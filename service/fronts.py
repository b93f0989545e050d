"""The fronts that ``place`` shows and draws beside its placement: what balance buys, and what moves buy.

What searches, shows and draws them is imported when it is asked for: a placement without a front does not wait for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from ..planner.budget import SAFETY_FACTOR, Budget
from ..planner.place.request import Request
from ..spec.placement import Placement
from ..spec.trace import Trace

DRAW_TIME = 1.2  # seconds of a processor to load what draws, and to draw
FRONT_PART = 0.5  # of the time that is left is a front's own at least: a picture that takes more is left out


@dataclass(frozen=True)
class Shown:
    """A front: its name and content in JSON, its page, and how to draw it."""

    name: str
    content: dict[str, Any]
    page: RenderableType
    draw: Callable[[Path], None]


@dataclass(frozen=True)
class Fronts:
    """What is asked for: the pictures of what balance and of what moves buy; None: not this one."""

    pareto: Path | None
    moves: Path | None

    @property
    def count(self) -> int:
        return len(self._asked)

    @property
    def _asked(self) -> list[tuple[Path, Callable[..., Shown]]]:
        both = ((self.pareto, _balance), (self.moves, _moves))
        return [(path, search) for path, search in both if path is not None]

    def check(self, trace: Trace, request: Request) -> None:
        """Raise ``MoeplanError`` where a front makes no sense."""
        if self.pareto is not None:
            from ..planner.place.pareto import check_front

            check_front(trace, request)
        if self.moves is not None:
            from ..planner.place.moves_front import check_moves_front

            check_moves_front(request)

    def search(
        self,
        trace: Trace,
        request: Request,
        placement: Placement,
        budget: Budget,
    ) -> tuple[list[Shown], list[Path]]:
        """The fronts, and the pictures that there was time for."""
        shown: list[Shown] = []
        drawn: list[Path] = []
        for done, (path, search) in enumerate(self._asked):
            mine = budget.part(1 / (self.count - done))
            drawing = DRAW_TIME * budget.slowdown
            draws = mine.part(1 - FRONT_PART).affords(drawing / SAFETY_FACTOR, f"the picture {path}")
            searching = mine.before(drawing) if draws else mine
            front = search(trace, request, placement, searching)
            shown.append(front)
            if draws and budget.affords(DRAW_TIME * budget.slowdown / SAFETY_FACTOR**2, f"the picture {path}"):
                front.draw(path)
                drawn.append(path)
        return shown, drawn


def _balance(trace: Trace, request: Request, placement: Placement, budget: Budget) -> Shown:
    from ..planner.place.pareto import pareto
    from .pages.pareto import draw, page

    front = pareto(trace, request, placement, budget=budget)
    return Shown("pareto", front.to_dict(), page(front), lambda path: draw(front, path))


def _moves(trace: Trace, request: Request, placement: Placement, budget: Budget) -> Shown:
    from ..planner.place.moves_front import moves_front
    from .pages.moves import draw_moves, moves_page

    front = moves_front(trace, request, placement, budget=budget)
    return Shown("moves_front", front.to_dict(), moves_page(front), lambda path: draw_moves(front, path))

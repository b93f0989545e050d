"""A placement with its proof, before it becomes a document."""

from dataclasses import dataclass

from ...solvers.result import Solution
from ...solvers.slots import Slots
from ...spec.placement import PlacementSolver

GREEDY, EPLB, PREVIOUS = "greedy balance", "EPLB", "the previous placement"
ALL_ARRANGEMENTS = "dynamic programming over all arrangements of a layer"
EXACT_PROGRAM = "exact program (HiGHS)"
"""Names of the bounds that exact programs prove, and of the solvers that found what they prove."""


@dataclass(frozen=True)
class Answer:
    """Slots, what is known of them, the cap that they keep."""

    slots: Slots
    solver: PlacementSolver
    cap: float | None = None
    notes: tuple[str, ...] = ()


def record_of(
    found: Solution, value: float, bound: float, bounds: dict[str, float], minimised: str, seconds: float
) -> PlacementSolver:
    proven = bound >= value * (1 - 1e-9)
    status = "optimal" if proven else "feasible" if found.status == "optimal" else found.status
    gap = 0.0 if proven else (value - bound) / value
    return PlacementSolver(
        status=status,
        objective=value,
        bound=min(bound, value),
        gap=max(gap, 0.0),
        seconds=seconds,
        minimised=minimised,
        found_by=found.solver,
        bounds=bounds,
    )


def record(value: float, bounds: dict[str, float], minimised: str, solver: str) -> PlacementSolver:
    """Of an answer that no search has made, for want of time; solver: what it is."""
    bound = max(bounds.values(), default=0.0)
    return record_of(
        Solution(None, value, bound, "time_limit", 0.0, solver=solver), value, bound, bounds, minimised, 0.0
    )

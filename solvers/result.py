"""What every solver returns, and how it says that it cannot."""

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

A = TypeVar("A")
Status = Literal["optimal", "feasible", "time_limit"]

DEFAULT_SOLVER = "highs"
TIME_LIMIT = 60.0  # seconds

ROUNDING = 1e-9  # relative: a bound this close below the objective differs from it by floating-point rounding only
TOLERANCE = 1e-6  # a floating-point back end may report a bound this far above the optimum


@dataclass(frozen=True, eq=False)
class Solution(Generic[A]):
    """An assignment and the proof of its quality; every problem here is a minimisation.

    assignment: what was decided; its form is the solver's.
    objective: the assignment's cost, recomputed from the input (never a back end's own rounding of it).
    bound: proven lower bound on the objective of *any* assignment; at most ``objective``.
    status: ``optimal`` proven; ``feasible`` from a heuristic; ``time_limit`` the best found when the time was up.
    seconds: wall-clock time, the one field that differs between equal runs.
    solver: what found the assignment, as text.
    work: part of the planned steps that was done, for a search with a budget of them; below 1 where time was up.
    """

    assignment: A
    objective: float
    bound: float
    status: Status
    seconds: float
    work: float = 1.0
    solver: str = ""

    def __post_init__(self) -> None:
        if self.bound > self.objective + TOLERANCE * (1.0 + abs(self.objective)):
            raise AssertionError(f"bound {self.bound} lies above objective {self.objective}: not a bound")
        if self.bound > self.objective - ROUNDING * abs(self.objective):
            object.__setattr__(self, "bound", self.objective)

    @classmethod
    def from_heuristic(
        cls, assignment: A, objective: float, bound: float, seconds: float, solver: str = ""
    ) -> "Solution[A]":
        """``optimal`` where the bound happens to prove it, else ``feasible``."""
        proven = bound >= objective - ROUNDING * abs(objective)
        return cls(assignment, objective, bound, "optimal" if proven else "feasible", seconds, solver=solver)

    @property
    def gap(self) -> float:
        """(objective - bound) / objective; 0 where they are equal, 1 where nothing is proven (bound 0)."""
        return 0.0 if self.objective == self.bound else (self.objective - self.bound) / abs(self.objective)


class SolverError(Exception):
    """No solution can be returned; the message is one line for the user."""


class SolverUnavailable(SolverError):
    """The back end asked for does not exist or is not installed; the message says what to install."""


class NotFound(SolverError):
    """The search ended without a solution, and without a proof that there is none.

    in_time: it did all that was planned, so that more time alone would not help.
    """

    def __init__(self, message: str, *, in_time: bool = False) -> None:
        super().__init__(message)
        self.in_time = in_time


class Infeasible(SolverError):
    """Proven: there is no solution.

    unit: what is missing (``bytes``, ``units``, ``slots``, ``options``, ``balance``).
    missing: how much, at least, in all.
    per_device: the same for each device, where it can be said; else empty.
    """

    def __init__(self, message: str, *, unit: str, missing: float, per_device: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.unit = unit
        self.missing = missing
        self.per_device = per_device

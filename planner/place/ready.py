"""The solvers' compiled loops: loaded, or compiled first, only where a budget has the time."""

import importlib
import sys
from typing import Any

from ..budget import Budget

LOAD_TIME, LOAD_ALL_TIME = 0.3, 1.0  # seconds of a processor: to load what annealing needs, and all solvers
LOAD_PART = 0.85  # of the time that is left may go to that
GRACE = 1.0  # seconds by which a search of few experts may be late: an answer without one is no better than EPLB's
TABLES_TIME, LARGE = 1.0, 14_848  # seconds of a processor for the tables of 58 layers x 256 experts
SOLVERS = "moeplan.solvers.compiled"


def solvers_ready(budget: Budget | None, size: int = 0, *, everything: bool = True) -> bool:
    """Load the solvers, where there is time to; ``None``: however long it takes.

    Where nothing is compiled yet, which takes half a minute once, another process compiles until half of the budget is
    spent; what it has finished by then stays. size: layers x experts, whose tables must be made as well. everything:
    not only what annealing begins with, which takes a third of the time.
    """
    if budget is None:
        _solvers().load(everything)
        return True
    tables = TABLES_TIME * size / LARGE
    here = SOLVERS in sys.modules and _solvers().loaded(everything)
    loading = 0.0 if here else LOAD_ALL_TIME if everything else LOAD_TIME
    time = budget if here else budget.part(LOAD_PART)
    time = time if everything else budget.before(-GRACE * max(1 - size / LARGE, 0.0))
    if not time.affords((loading + tables) * budget.slowdown, "a search (loading the solvers would take too long)"):
        return False
    if here:
        return True
    if not _solvers().is_compiled():
        budget.tell(what="compiling the solvers, once, in about half a minute")
        if not _solvers().compile_within(budget.left / 2):
            budget.skip("a search (compile the solvers once, with `python -m moeplan.solvers.compiled`)")
            return False
    _solvers().load(everything)
    return True


def _solvers() -> Any:
    return importlib.import_module("...solvers.compiled", __package__)

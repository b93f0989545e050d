"""The solvers' compiled loops: loaded, or compiled first, only where a budget has the time."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

from ..budget import Budget

LOAD_TIME = 1.3  # seconds of a processor that importing the solvers and loading what is compiled of them takes
LOAD_PART = 0.85  # of the time that is left may go to that
TABLES_TIME, LARGE = 2.0, 14_848  # seconds of a processor for the tables of 58 layers x 256 experts
SOLVERS = "moeplan.solvers.compiled"


def solvers_ready(
    budget: Budget | None, on_event: Callable[[dict[str, Any]], None] | None = None, size: int = 0
) -> bool:
    """Load the solvers, where there is time to; ``None``: however long it takes.

    Where nothing is compiled yet, which takes half a minute once, another process compiles until half of the budget is
    spent; what it has finished by then stays. size: layers x experts, whose tables must be made as well.
    """
    tables = TABLES_TIME * size / LARGE
    what = "a search (loading the solvers would take too long)"
    here = SOLVERS in sys.modules and importlib.import_module(SOLVERS).loaded()
    if budget is not None and here and not budget.affords(tables * budget.slowdown, what):
        return False
    if budget is None or here:
        if on_event:
            on_event({"what": "loading the solvers (compiled once, in about half a minute)"})
        _solvers().load_all()
        return True
    if not budget.part(LOAD_PART).affords((LOAD_TIME + tables) * budget.slowdown, what):
        return False
    if not _solvers().is_compiled():
        if on_event:
            on_event({"what": "compiling the solvers, once, in about half a minute"})
        if not _solvers().compile_within(budget.left / 2):
            budget.skip("a search (compile the solvers once, with `python -m moeplan.solvers.compiled`)")
            return False
    return True


def _solvers() -> Any:
    return importlib.import_module("...solvers.compiled", __package__)

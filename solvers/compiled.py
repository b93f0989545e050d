"""The solvers' compiled inner loops, loaded before a clock runs: a search must not take compilation for slow steps.

What is compiled is cached, for exactly these sources (``solvers/__init__``). ``python -m moeplan.solvers.compiled``
compiles ahead, which ``make setup`` does; else the first search of a fresh installation does, in about half a minute
that counts for no time limit.
"""

import logging
import os
from functools import cache
from typing import Any

import numpy as np

from . import NO_CACHE
from .affinity_bound import affinity_bounds
from .annealing_chain import load_kernels
from .replication import replicate
from .replication_bound import Shares

logger = logging.getLogger("moeplan.solvers")

BOUND_STEPS = 60  # enough for every relaxation to have its turn


@cache
def load_all() -> None:
    """Run every solver that has compiled loops on a tiny problem: two layers of four experts on two devices."""
    if NO_CACHE:
        logger.warning("moeplan: solvers: compiled anew, in about half a minute: %s", NO_CACHE)
    umask = os.umask(0o077)  # what others could write would not be loaded again
    try:
        _run_all()
    finally:
        os.umask(umask)


def _run_all() -> None:
    load_kernels()
    windows = np.arange(1.0, 17.0).reshape(2, 2, 4)
    capped: dict[str, Any] = {"samples": windows, "balance_cap": 2.0}
    affinity_bounds(np.ones((1, 4, 4)), np.full(2, 2), np.arange(2), steps=BOUND_STEPS, **capped)
    kinds: tuple[Shares, ...] = ("even", "optimal")
    for load in (windows, windows[0]):  # a single window has a search of its own
        for shares in kinds:
            for groups in (1, 2):
                replicate(load, np.ones(2), np.full(2, 3), np.arange(2), groups=groups, shares=shares)


if __name__ == "__main__":
    load_all()

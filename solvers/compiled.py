"""The solvers' compiled inner loops, loaded before a clock runs: a search must not take compilation for slow steps.

What is compiled is cached, for exactly these sources (``solvers/__init__``). ``python -m moeplan.solvers.compiled``
compiles ahead, which ``make setup`` does; else the first search of a fresh installation does, in about half a minute.
A file beside the cache says that it is complete, for this processor and this numba.
"""

import hashlib
import logging
import os
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llvmlite.binding
import numpy as np

from .jit import NO_CACHE, numba
from .placement.chain import load_kernels

if TYPE_CHECKING:
    from .bounds.replication import Shares

logger = logging.getLogger("moeplan.solvers")

BOUND_STEPS = 60  # enough for every relaxation to have its turn


def is_compiled() -> bool:
    """Whether everything is in the cache."""
    return _marker().exists()


def compile_within(seconds: float) -> bool:
    """Compile in another process, which is ended after so many seconds; whether everything is compiled then.

    Where nothing can be kept (``NO_CACHE``), compiling is of no use to this process.
    """
    if NO_CACHE:
        return False
    command = [sys.executable, "-m", "moeplan.solvers.compiled"]
    try:
        subprocess.run(command, timeout=max(seconds, 0.1), check=False, capture_output=True)
    except subprocess.TimeoutExpired:
        return False
    return is_compiled()


def loaded(everything: bool) -> bool:
    """Whether this process has loaded everything, or at least what annealing needs."""
    return load_all.cache_info().currsize > 0 or (not everything and load_kernels.cache_info().currsize > 0)


def load(everything: bool) -> None:
    """Load everything, or what annealing needs; the rest then loads where it begins."""
    if everything:
        load_all()
    else:
        load_kernels()


def _marker() -> Path:
    llvm = llvmlite.binding
    machine = f"{numba.__version__} {llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    return Path(os.environ["NUMBA_CACHE_DIR"]) / f"complete-{hashlib.sha256(machine.encode()).hexdigest()[:16]}"


@cache
def load_all() -> None:
    """Run every solver that has compiled loops on a tiny problem: two layers of four experts on two devices."""
    if NO_CACHE:
        logger.warning("moeplan: solvers: compiled anew, in about half a minute: %s", NO_CACHE)
    umask = os.umask(0o077)  # what others could write would not be loaded again
    try:
        _run_all()
        with suppress(OSError):  # a cache that nobody can write to
            _marker().touch()
    finally:
        os.umask(umask)


def _run_all() -> None:
    # Imported when they are needed: annealing begins without them.
    from . import pipeline
    from .bounds.crossings import affinity_bounds
    from .placement.traffic import add_pairs
    from .replication.replicate import replicate

    load_kernels()
    windows = np.arange(1.0, 17.0).reshape(2, 2, 4)
    capped: dict[str, Any] = {"samples": windows, "balance_cap": 2.0}
    affinity_bounds(np.ones((1, 4, 4)), np.full(2, 2), np.arange(2), steps=BOUND_STEPS, **capped)
    kinds: tuple[Shares, ...] = ("even", "optimal")
    for load in (windows, windows[0]):  # a single window has a search of its own
        for shares in kinds:
            for groups in (1, 2):
                replicate(load, np.ones(2), np.full(2, 3), np.arange(2), groups=groups, shares=shares)
    ids, gates = np.zeros((2, 1), np.int32), np.ones((1, 2, 1))
    part, part_gates = np.zeros((2, 1, 2), np.int32)[:, :, 1], np.ones((1, 2, 1, 2))[..., 1]
    for chosen, weights in ((ids, gates), (part, part_gates)):  # whole arrays, and one layer's part of them
        add_pairs(chosen, chosen, weights, weights, np.zeros((2, 1, 1)))
    one, none = np.zeros((1, 1), int), np.zeros((1, 1, 1))
    program = np.array([pipeline.START, pipeline.WAIT]), np.zeros(2, int), np.zeros((1, 2, 1))
    pipeline.clocks(*program, one[0], one, one, none, none, none, none[0])


if __name__ == "__main__":
    load_all()

"""Hypothesis: no deadlines, as machines are noisy; in CI the same examples every time, elsewhere new ones.

`make unit` first runs two files at a time, then alone what judges a time: the files in ``ALONE``, but for their tests
marked ``beside``, and tests marked ``alone``. Whoever only starts ranks or commands runs beside others.
"""

import os

import pytest
from hypothesis import settings

# Consoles keep the width that COLUMNS has when they are made. Made here without one (a worker has the terminal's), they
# take that of each test.
os.environ.pop("COLUMNS", None)
import moeplan.service.console  # noqa: F401

ALONE = {"test_lab", "test_profiler", "test_run"}
# Begun first, the longest before the others, so that none of them is left over at the end.
LONG = (
    "test_gpu_dry",
    "test_docs_commands",
    "test_apply_plan_families",
    "test_families_run",
    "test_kills",
    "test_wheel",
    "test_kills_strategies",
    "test_launch",
    "test_kernels_gpu",
    "test_two_hosts",
    "test_cli",
)

settings.register_profile("moeplan", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("moeplan")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads that spin while they wait take the processors from the other worker. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    for item in items:
        if item.path.stem in ALONE and not item.get_closest_marker("beside"):
            item.add_marker("alone")

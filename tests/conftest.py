"""Hypothesis: no deadlines, as machines are noisy; in CI the same examples every time, elsewhere new ones.

Files that start ranks of their own or measure time are marked ``alone``, but for their tests marked ``beside``, which
do neither: `make unit` runs all others side by side first.
"""

import os

import pytest
from hypothesis import settings

ALONE = {
    "test_cli",
    "test_collectives",
    "test_executor",
    "test_identity",
    "test_lab",
    "test_launch",
    "test_profiler",
    "test_run",
    "test_run_placement",
    "test_run_weights",
    "test_selection_run",
    "test_strategies",
    "test_two_hosts",
}

settings.register_profile("moeplan", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("moeplan")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in ALONE and not item.get_closest_marker("beside"):
            item.add_marker("alone")

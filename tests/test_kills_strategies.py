"""A rank killed at random moments of every strategy's steps; ``benchmarks/kills.py`` does the same many times."""

import random

import pytest

from moeplan.benchmarks.kills import CASES, kill_once

MOMENTS = 2


@pytest.mark.parametrize("case", CASES)
def test_a_killed_rank_is_named_and_nothing_is_left(case):
    draw = random.Random(case)
    assert [moment for moment in (kill_once(case, draw) for _ in range(MOMENTS)) if moment.wrong] == []

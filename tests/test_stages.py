"""Layers over unequal stages: the dynamic program against all splits."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.solvers.result import Infeasible
from moeplan.solvers.stages import split_stages


def every_split(layers: int, stages: int) -> list[tuple[int, ...]]:
    """All numbers of layers, each at least 1."""
    return [
        tuple(b - a for a, b in zip((0, *cuts), (*cuts, layers), strict=True))
        for cuts in combinations(range(1, layers), stages - 1)
    ]


def weigh(each: np.ndarray, first: np.ndarray, split: tuple[int, ...]) -> list[float]:
    """Of every stage, layer by layer."""
    found, at = [], 0
    for stage, count in enumerate(split):
        found.append(float(first[stage]) + sum(float(v) for v in each[stage, at : at + count]))
        at += count
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, ...]:
    stages = draw(st.integers(1, 4))
    layers = draw(st.integers(stages, 8))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    seconds, sizes = rng.integers(1, 20, (2, stages, layers)).astype(float)
    fixed, held = rng.integers(0, 10, (2, stages)).astype(float)
    room = rng.integers(10, draw(st.sampled_from([40, 100, 400])), stages).astype(float)
    return seconds, fixed, sizes, held, room


@settings(max_examples=150, deadline=None)
@given(cases())
def test_as_all_splits_say(case: tuple[np.ndarray, ...]) -> None:
    seconds, fixed, sizes, held, room = case
    splits = every_split(seconds.shape[1], len(seconds))
    lacking = [sum(max(b - r, 0) for b, r in zip(weigh(sizes, held, s), room, strict=True)) for s in splits]
    fitting = [s for s, lack in zip(splits, lacking, strict=True) if lack == 0]
    if not fitting:
        with pytest.raises(Infeasible) as error:
            split_stages(*case)
        assert error.value.missing == pytest.approx(min(lacking))
        assert sum(error.value.per_device) == pytest.approx(min(lacking))
        return
    found = split_stages(*case)
    chosen = tuple(found.assignment.tolist())
    assert chosen in fitting
    assert found.objective == pytest.approx(max(weigh(seconds, fixed, chosen)))
    assert found.objective == pytest.approx(min(max(weigh(seconds, fixed, s)) for s in fitting))
    assert found.gap == 0


def test_a_slow_stage_takes_fewer_layers_until_memory_says_more() -> None:
    seconds = np.array([[1.0] * 40, [4.0] * 40])
    sizes = np.ones((2, 40))
    free = split_stages(seconds, np.zeros(2), sizes, np.zeros(2), np.array([100.0, 100.0]))
    assert free.assignment.tolist() == [32, 8]
    tight = split_stages(seconds, np.zeros(2), sizes, np.zeros(2), np.array([25.0, 100.0]))
    assert tight.assignment.tolist() == [25, 15]


def test_more_stages_than_layers() -> None:
    with pytest.raises(Infeasible, match="3 stages for 2 layers"):
        split_stages(np.ones((3, 2)), np.zeros(3), np.ones((3, 2)), np.zeros(3), np.ones(3))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_what_is_no_time_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        split_stages(np.array([[1.0, bad]]), np.zeros(1), np.ones((1, 2)), np.zeros(1), np.ones(1))

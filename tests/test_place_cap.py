"""The default balance cap, and the load samples that it is of."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.budget import Budget
from moeplan.planner.place.cap import (
    ALLOWED,
    FRACTIONS,
    LEAST_SLACK,
    Cap,
    _fraction,
    balance_range,
    default_cap,
    first_cap,
)
from moeplan.planner.place.fleet import Fleet, even_fleet
from moeplan.planner.place.request import Request
from moeplan.planner.place.sample import DRAWN, DRAWN_FROM, DRAWN_OF_FEW, SAMPLES, load_samples, windows
from moeplan.planner.place.single import Single
from moeplan.planner.place.solve import place
from moeplan.solvers.balance import check_cap, mean_balance
from moeplan.solvers.result import NotFound
from moeplan.spec.trace import Trace
from moeplan.tests.routings import random_trace


def in_sequences(trace: Trace, count: int) -> Trace:
    lengths = [len(part) for part in np.array_split(np.arange(trace.tokens), count)]
    return Trace.of(trace.expert_ids, trace.num_experts, expert_weights=trace.expert_weights, seq_len=lengths)


def chosen(single: Single, trace: Trace, seconds: float = 60.0) -> Cap:
    """The default cap, in so many seconds."""
    return default_cap(single, trace, Budget.of(seconds))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(60, 200))
def test_load_samples_are_drawn_windows(seed, sequences, tokens):
    trace = in_sequences(random_trace(seed, 2, 8, tokens), sequences)
    parts, samples = windows(trace, DRAWN_FROM), load_samples(trace)
    assert samples.shape == (SAMPLES, 2, 8)
    assert np.array_equal(samples, load_samples(trace))
    drawn = np.resize(DRAWN_OF_FEW if sequences <= 3 else DRAWN, SAMPLES)  # windows in each sample
    sizes = samples.sum(axis=2) / trace.top_k
    assert (drawn[:, None] * (tokens // DRAWN_FROM) <= sizes).all()
    assert (sizes <= drawn[:, None] * (tokens // DRAWN_FROM + 1)).all()
    assert (samples <= drawn[:, None, None] * parts.max(axis=0)).all()


def test_counts_are_their_only_sample():
    trace = Trace.of_counts(np.array([[3.0, 1.0], [2.0, 2.0]]))
    assert np.array_equal(load_samples(trace), trace.expert_counts[None])


@given(st.floats(-0.2, 0.2), st.floats(0.01, 1.0))
def test_the_fraction_is_where_a_line_through_the_worse_half_reaches_what_is_allowed(start, slope):
    worse = start + slope * np.array(FRACTIONS)
    expected = pytest.approx(np.clip((ALLOWED - start) / slope, FRACTIONS[0], FRACTIONS[-1]), abs=1e-6)
    assert _fraction(np.array([worse, worse - 0.1])) == expected
    excess = np.array([worse, worse])
    excess[0, 1] = excess[1, 2] = np.nan  # a trial that found nothing does not count
    assert _fraction(excess) == expected


def test_without_trials_the_safest_cap_is_taken():
    assert _fraction(np.full((2, len(FRACTIONS)), np.nan)) == FRACTIONS[0]
    assert _fraction(np.full((2, len(FRACTIONS)), -0.1)) == FRACTIONS[-1]
    assert _fraction(np.full((2, len(FRACTIONS)), 0.1)) == FRACTIONS[0]


def test_the_cap_lies_between_the_coolest_and_eplb():
    trace = in_sequences(random_trace(3, 3, 16, 600, 3), 12)
    fleet = Fleet.of(even_fleet(4, 2, 16, False))
    cap, notes, in_time = chosen(Single(fleet), trace)
    assert notes == ()
    assert in_time
    found = place(trace, Request(even_fleet(4, 2, 16, False), 16, steps=20_000, time_limit=60.0))
    assert found.balance_cap == cap  # the same trials, the same cap
    assert found.balance_cap_of == "samples"
    load = load_samples(trace)
    devices = np.zeros((3, 16), np.int64)
    for row, layer in zip(devices, found.layers, strict=True):
        for device, experts in enumerate(layer.slots):
            row[list(experts)] = device
    assert mean_balance(devices, load, fleet.speed) <= cap * (1 + 1e-6)
    eplb = found.scores["eplb"].fit.balance_mean
    assert cap >= 1 + LEAST_SLACK
    assert cap < 1.5 * eplb


@dataclass(frozen=True)
class Unlucky(Single):
    """Finds nothing within a cap; ``in_time``: not because time was up."""

    in_time: bool = False

    def solve(self, affinity, load, *, cap=math.inf, **options):
        if cap < math.inf:
            raise NotFound("nothing", in_time=self.in_time)
        return super().solve(affinity, load, cap=cap, **options)


class Hurried(Single):
    """Its trials had time for a quarter of their steps."""

    def solve(self, affinity, load, *, cap=math.inf, **options):
        found = super().solve(affinity, load, cap=cap, **options)
        return replace(found, work=0.25, status="time_limit") if cap < math.inf else found


def test_trials_cut_short_lower_the_cap_and_are_told():
    trace = in_sequences(random_trace(3, 3, 16, 600, 3), 12)
    fleet = Fleet.of(even_fleet(4, 2, 16, False))
    coolest, usual, _ = balance_range(Single(fleet), trace, Budget.of(60.0))
    usually, hurried = (chosen(kind(fleet), trace) for kind in (Single, Hurried))
    assert coolest + LEAST_SLACK < usually.value <= usual  # or nothing is tested
    assert hurried.value - coolest == pytest.approx(max(0.25 * (usually.value - coolest), LEAST_SLACK))
    assert not hurried.in_time
    assert len(hurried.notes) == 1
    assert "had time for 25% of their steps" in hurried.notes[0]


@pytest.mark.parametrize("in_time", [False, True])
def test_trials_that_find_nothing_are_told(in_time):
    trace = in_sequences(random_trace(3, 3, 16, 600, 3), 12)
    single = Unlucky(Fleet.of(even_fleet(4, 2, 16, False)), in_time=in_time)
    found = chosen(single, trace)
    assert found.in_time == in_time
    assert found.value == balance_range(single, trace, Budget.of(60.0)).at(FRACTIONS[0])
    why = ", so it is tighter than need be" if in_time else " in their time: raise --time-limit"
    assert found.notes == (f"8 of 8 trials of the balance cap found nothing{why}",)


def test_without_time_for_trials_the_cap_is_in_between():
    trace = in_sequences(random_trace(3, 3, 16, 600, 3), 12)
    single = Single(Fleet.of(even_fleet(4, 2, 16, False)))
    found = chosen(single, trace, 0.0)
    coolest, usual, _ = balance_range(single, trace, Budget.of(60.0))
    assert coolest < found.value == first_cap(single, trace) < usual
    assert not found.in_time


@given(
    st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([(8, 4, 2), (12, 3, 1), (16, 4, 2)]), st.integers(1, 2)
)
@settings(max_examples=30, deadline=None)
def test_the_first_cap_is_never_proven_impossible(seed, layers, shape, top_k):
    experts, devices, hosts = shape
    trace = random_trace(seed, layers, experts, 60, top_k)
    fleet = Fleet.of(even_fleet(devices, hosts, experts, False))
    check_cap(load_samples(trace), fleet.speed, fleet.capacity, first_cap(Single(fleet), trace))

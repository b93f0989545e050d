"""Placing at any time: what short, stopped and whole searches return, and what they say of it."""

import math
from dataclasses import replace
from threading import Event

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.budget import Budget
from moeplan.planner.place import anytime, ready
from moeplan.planner.place.baselines import inside_hosts
from moeplan.planner.place.cap import first_cap
from moeplan.planner.place.fleet import Fleet, even_fleet
from moeplan.planner.place.hosts_first import hosts_first
from moeplan.planner.place.request import Request
from moeplan.planner.place.sample import load_samples
from moeplan.planner.place.single import Single
from moeplan.planner.place.solve import place
from moeplan.solvers.balance import mean_balance
from moeplan.solvers.placement.walks import THREADS, Walks
from moeplan.spec.placement import Placement
from moeplan.tests.routings import chained_trace, random_trace, topics_trace

SHORT = "more than one short search"


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    ready.solvers_ready(None)


def asked(experts: int, devices: int = 4, hosts: int = 2, **options) -> Request:
    return Request(even_fleet(devices, hosts, experts, False), experts, **({"steps": 20_000} | options))


def notes(found: Placement) -> str:
    return " ".join(found.notes)


def test_a_short_search_is_said_to_be_one_and_beats_the_baselines():
    trace, _ = topics_trace(0, 6, 32, topics=8)
    request = asked(32, fit=(0.0, 0.5), steps=None)
    ready.solvers_ready(None, everything=False)
    found = place(trace, request, budget=Budget.of(0.0))
    assert SHORT in notes(found)
    assert found.solver.status in ("time_limit", "optimal")  # without any crossing it is proven
    assert found.solver.found_by == "annealing"
    assert "as counted on the fitted part" in found.solver.minimised
    mine, eplb = found.scores["placement"].fit, found.scores["eplb"].fit
    assert mine.boundary_cross_host < eplb.boundary_cross_host
    assert found.solver.bound <= found.solver.objective


def test_with_time_the_traffic_is_smoothed_and_a_cap_tried():
    trace = random_trace(3, 3, 16, 600, 3)
    found = place(trace, asked(16, time_limit=60.0))
    assert SHORT not in notes(found)
    assert "lets expect of tokens to come" in found.solver.minimised


def test_a_search_that_is_stopped_at_once_returns_what_keeps_the_cap():
    trace = random_trace(1, 6, 48, 600, 2)
    budget = Budget.of(60.0)
    budget.stop.set()
    found = place(trace, asked(48, balance_cap=1.5), budget=budget)
    assert found.solver.status == "time_limit"
    assert found.scores["placement"].fit.balance_mean <= 1.5 * (1 + 1e-9)


def test_a_search_that_is_stopped_midway_is_no_worse_than_its_first_answer(monkeypatch):
    """Stopped while the long walks are still warm: what they have then is worse than nothing."""
    trace, _ = topics_trace(0, 6, 48, topics=8)
    budget, firsts = Budget.of(60.0), []
    first, solve = anytime._first, Single.solve

    def noted(problem, steps, budget):
        firsts.append((problem, first(problem, steps, budget).solution.assignment))
        return first(problem, steps, budget)

    def stopped(self, affinity, load, *, start=None, **options):
        if start is not None and options.get("chains") is None:  # the long search
            options["budget"] = replace(options["budget"], on_event=lambda event: budget.stop.set())
        return solve(self, affinity, load, start=start, **options)

    monkeypatch.setattr(anytime, "_first", noted)
    monkeypatch.setattr(Single, "solve", stopped)
    found = place(trace, asked(48, objective="locality", steps=1_000_000), budget=budget)
    assert found.solver.status == "time_limit"
    problem, placed = firsts[0]
    affinity = problem.single.affinity(problem.fitted)
    mine = np.array([layer.share_matrix(48).argmax(axis=1) for layer in found.layers])
    assert problem.single.cost(affinity, mine) <= problem.single.cost(affinity, placed) * (1 + 1e-6)


@pytest.mark.parametrize(("experts", "by"), [(8, "dynamic programming"), (48, "annealing")])
def test_a_placement_says_what_found_it(experts, by):
    trace = random_trace(0, 3, experts, 400, 2)
    found = [place(trace, asked(experts, time_limit=60.0)) for _ in range(2)]
    assert [placed.solver.found_by for placed in found] == [by, by]
    assert found[0].layers == found[1].layers
    assert found[0].solver.gap == 0 or by == "annealing"


def test_without_a_search_it_says_whose_placement_it_is(monkeypatch):
    monkeypatch.setattr("moeplan.planner.place.solve.solvers_ready", lambda *_, **__: False)
    trace = random_trace(0, 3, 12, 400, 2)
    assert place(trace, asked(12)).solver.found_by == "EPLB"
    assert place(trace, asked(12, devices=5, hosts=1)).solver.found_by == "greedy balance"
    previous = place(trace, asked(12))
    assert place(trace, asked(12, previous=previous)).solver.found_by == "the previous placement"


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.sampled_from([(8, 4, 2), (18, 6, 3), (10, 4, 2)]))
def test_hosts_first_keeps_slots_and_cap(seed, layers, shape):
    experts, devices, hosts = shape
    trace = random_trace(seed, layers, experts, 300, 2)
    single = Single(Fleet.of(even_fleet(devices, hosts, experts, False)))
    load, affinity = load_samples(trace), single.affinity(trace)
    cap = 1.2 * first_cap(single, trace)
    found = hosts_first(single, affinity, load, cap, 2000, Budget.of(math.inf))
    if found is None:
        return
    held = np.stack([np.bincount(row, minlength=devices) for row in found])
    assert (held <= single.fleet.capacity).all()
    assert mean_balance(found, load, single.fleet.speed) <= cap * (1 + 1e-6)


def test_hosts_first_finds_topics_and_leaves_what_it_cannot_choose():
    trace, topic_of = topics_trace(2, 3, 16)
    fleet = Fleet.of(even_fleet(4, 2, 16, False))
    single, load = Single(fleet), load_samples(trace)
    affinity = single.affinity(trace)
    found = hosts_first(single, affinity, load, math.inf, 20_000, Budget.of(math.inf))
    assert found is not None
    for row, topics in zip(fleet.hosts[found], topic_of, strict=True):
        assert {len(set(np.array(topics)[row == host].tolist())) for host in (0, 1)} == {1}
    for other in (replace(single, groups=2), replace(single, previous=found)):
        assert hosts_first(other, affinity, load, math.inf, 20_000, Budget.of(math.inf)) is None
    assert hosts_first(single, affinity, load, math.inf, 20_000, Budget.of(0.0)) is None


def test_inside_hosts_never_leaves_the_host():
    rng = np.random.default_rng(0)
    fleet = Fleet.of(even_fleet(6, 2, 18, False))
    host_of = np.stack([rng.permutation(np.repeat([0, 1], 9)) for _ in range(5)])
    placed = inside_hosts(host_of, rng.random((5, 18)), fleet)
    assert np.array_equal(fleet.hosts[placed], host_of)


def test_walks_left_out_are_taken_back_where_there_is_time():
    walks = Walks(None, 1000, 0.0, (8, 4, 2), 0, Event(), None)  # its deadline is over
    walks.pace = 1000.0
    assert walks.affordable() == THREADS
    assert walks.planned == (THREADS, THREADS, 1)
    assert walks.squeezed
    assert not walks.adds_chains()
    walks.deadline = math.inf
    added = sum(walks.adds_chains() for _ in range(10))
    assert (added, walks.planned[0]) == (3, 8)
    assert [walks.adds_generation() for _ in range(3)] == [True, False, False]
    walks.stop.set()
    walks.left_out = (16, 4)
    assert not walks.adds_chains()
    assert not walks.adds_generation()


def test_ctrl_c_after_the_first_answer_keeps_it():
    """Ctrl-C while caps are tried: the first answer is written, not where its search began."""
    stop = Event()

    def hear(event):
        if str(event.get("what", "")).startswith("finding a balance"):
            stop.set()

    trace = chained_trace(0, 8, 16, 1024, 2)
    found = place(trace, asked(16, steps=None), budget=Budget.of(60.0, stop=stop, on_event=hear))
    assert stop.is_set()
    assert found.solver.status == "time_limit"
    scores = {name: both.fit.boundary_cross_host for name, both in found.scores.items()}
    assert scores["placement"] < 0.8 * scores["eplb"]

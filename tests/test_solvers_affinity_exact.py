from itertools import product

import numpy as np
import pytest

from moeplan.solvers import Infeasible, NotFound, SolverUnavailable
from moeplan.solvers.placement.crossings import host_weights
from moeplan.solvers.placement.fan_out import expert_sets
from moeplan.tests.affinity_cases import WEIGHTS, brute_force, layouts, random_capacity, random_case
from moeplan.tests.yardsticks.crossings_cp_sat import place_with_cp_sat
from moeplan.tests.yardsticks.crossings_program import place_exactly
from moeplan.tests.yardsticks.fan_out_program import fan_out, place_by_fan_out
from moeplan.tests.yardsticks.placement_problem import AffinityProblem


def answer(solve, *arguments, **options):
    """The objective, or inf where it is proven that there is none."""
    try:
        solution = solve(*arguments, **options)
    except Infeasible:
        return np.inf
    assert solution.status == "optimal"
    assert solution.gap == pytest.approx(0.0, abs=1e-6)
    problem = AffinityProblem.checked(
        *arguments, **{key: options.get(key) for key in ("together", "load", "speed", "limit")}
    )
    assert problem.keeps(solution.assignment)
    assert solution.objective == pytest.approx(problem.movement(solution.assignment))
    return solution.objective


@pytest.mark.parametrize("seed", range(5))
def test_integer_program_cp_sat_and_brute_force_agree(seed):
    rng = np.random.default_rng(seed)
    infeasible = proven = 0
    for _ in range(32):
        arguments, options = random_case(rng)
        best = brute_force(AffinityProblem.checked(*arguments, **options))
        assert answer(place_exactly, *arguments, **options) == pytest.approx(best)
        assert answer(place_with_cp_sat, *arguments, **options) == pytest.approx(best)
        infeasible += np.isinf(best)
        proven += 0 < best < np.inf
    assert proven > 6
    assert infeasible > 0


def test_the_integer_program_also_runs_on_cp_sat_and_cbc():
    rng = np.random.default_rng(7)
    for _ in range(12):
        arguments, options = random_case(rng, most=100)
        best = brute_force(AffinityProblem.checked(*arguments, **options))
        assert answer(place_exactly, *arguments, **options, solver="cp_sat") == pytest.approx(best)
        assert answer(place_exactly, *arguments, **options, solver="cbc") == pytest.approx(best)


def test_the_largest_small_case():
    """4 layers of 8 experts on 4 devices of 2 hosts: 2,520 placements of a layer."""
    rng = np.random.default_rng(3)
    follow = np.stack([np.eye(8)[rng.permutation(8)] for _ in range(3)])
    transitions = rng.integers(0, 4, (3, 8, 8)) + np.round(20 * follow)
    arguments = (transitions, [2, 2, 2, 2], [0, 0, 1, 1], 1.0, 3.0)
    on = np.array([row for row in product(range(4), repeat=8) if (np.bincount(row, minlength=4) == 2).all()])
    assert len(on) == 2520
    assert answer(place_with_cp_sat, *arguments) == pytest.approx(least_of_equal_slots(arguments, on))


def least_of_equal_slots(arguments, rows):
    transitions, _, hosts, device_weight, host_weight = arguments
    weight = host_weights(hosts, device_weight, host_weight)
    on = (rows[:, :, None] == np.arange(4)).reshape(len(rows), -1).astype(np.float32)
    best = np.zeros(len(rows), np.float32)
    for counts in transitions:
        steps = on @ np.kron(counts, weight).astype(np.float32) @ on.T
        best = (best[:, None] + steps).min(axis=0)
    return float(best.min())


def test_hosts_first_is_exflows_staging():
    """Each stage is optimal; together they bound, and may miss, the joint optimum."""
    rng = np.random.default_rng(11)
    missed = 0
    for _ in range(16):
        transitions = rng.integers(0, 20, (2, 4, 4))
        arguments = (transitions, [1, 1, 1, 1], [0, 0, 1, 1], 1.0, 1.5)
        best = brute_force(AffinityProblem.checked(*arguments))
        staged = place_exactly(*arguments, stage="hosts_first")
        assert staged.bound <= best + 1e-9
        assert staged.objective >= best - 1e-9
        hosts_only = place_exactly(transitions, [2, 2], [0, 1], 1.0, 1.0).objective
        on_host = np.array([0, 0, 1, 1])[staged.assignment]
        crossed = AffinityProblem.checked(transitions, [2, 2], [0, 1], 1.0, 1.0).movement(on_host)
        assert crossed == pytest.approx(hosts_only)
        missed += staged.objective > best + 1e-9
    assert 0 < missed < 16


def test_hosts_first_says_when_the_second_stage_has_too_few_slots():
    # Together the hosts carry the load, but no device of a host can carry the expert of 6.
    arguments = ([[[9, 0, 0], [0, 9, 0], [0, 0, 9]]], [2, 2, 2], [0, 0, 1])
    options = {"load": [[6, 1, 1]] * 2, "limit": [3.5, 3.5], "speed": [1.0, 1.0, 2.0]}
    joint = place_exactly(*arguments, **options)
    assert joint.objective == 0
    assert joint.assignment[0, 0] == 2
    with pytest.raises(NotFound, match="use stage 'joint'"):
        place_exactly(
            np.zeros((0, 2, 2)),
            [1, 1, 2],
            [0, 0, 1],
            stage="hosts_first",
            load=[[6, 6]],
            limit=[6],
            speed=[0.6, 0.6, 1.0],
        )


def test_company_makes_the_relaxation_prove_something():
    """A time limit too short to branch leaves the root's bound, which ExFlow's cuts leave at 0."""
    transitions = np.random.default_rng(0).integers(0, 100, (2, 12, 12))
    incumbent = np.tile(np.repeat(np.arange(6), 2), (3, 1))
    solution = place_exactly(transitions, [2] * 6, [0] * 6, incumbent=incumbent, time_limit=3)
    assert solution.status == "time_limit"
    assert 0.5 * transitions.sum() < solution.bound < solution.objective


def test_an_incumbent_is_returned_when_the_time_ends_first_and_never_worsened():
    rng = np.random.default_rng(5)
    transitions = rng.integers(0, 50, (2, 24, 24))
    incumbent = np.tile(np.repeat(np.arange(4), 6), (3, 1))
    for solve in (place_exactly, place_with_cp_sat):
        solution = solve(transitions, [6] * 4, [0, 0, 1, 1], 1.0, 2.0, incumbent=incumbent, time_limit=0.01)
        start = AffinityProblem.checked(transitions, [6] * 4, [0, 0, 1, 1], 1.0, 2.0).movement(incumbent)
        assert solution.status == "time_limit"
        assert solution.bound < solution.objective <= start
        with pytest.raises(NotFound, match="raise the time limit"):
            solve(transitions, [6] * 4, [0, 0, 1, 1], 1.0, 2.0, time_limit=1e-3)


def test_an_optimal_incumbent_is_confirmed():
    rng = np.random.default_rng(6)
    for _ in range(8):
        arguments, options = random_case(rng, most=100)
        best = brute_force(AffinityProblem.checked(*arguments, **options))
        if np.isinf(best):
            continue
        first = place_exactly(*arguments, **options).assignment
        assert answer(place_exactly, *arguments, **options, incumbent=first) == pytest.approx(best)
        assert answer(place_exactly, *arguments, **options, incumbent=first, solver="cp_sat") == pytest.approx(best)
        assert answer(place_with_cp_sat, *arguments, **options, incumbent=first) == pytest.approx(best)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transitions": [[[1, -1], [0, 0]]]}, "transitions must be finite"),
        ({"transitions": [[[1, 2, 3]]]}, "transitions must be finite"),
        ({"capacity": [1.5, 1]}, "whole number of slots"),
        ({"hosts": [0]}, "host number for each of 2 devices"),
        ({"device_weight": 2.0}, "0 <= device_weight <= host_weight, got 2.0 and 1.0"),
        ({"together": np.zeros((1, 2, 2))}, r"together must be finite, non-negative \[2, 2, 2\]"),
        ({"load": [[1, 2]]}, r"load must be finite, non-negative \[2, 2\]"),
        ({"speed": [1.0, 0.0]}, "positive number for each of 2 devices"),
        ({"limit": [1.0]}, "for each of 2 layers"),
        ({"incumbent": [[0, 0], [0, 1]]}, "incumbent breaks the slots"),
        ({"incumbent": [[0, 1]]}, "incumbent must be devices"),
        ({"time_limit": 0}, "time_limit must be a positive"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"transitions": [[[1, 2], [3, 4]]], "capacity": [1, 1], "hosts": [0, 0]}
    for solve in (place_exactly, place_with_cp_sat):
        with pytest.raises(ValueError, match=message):
            solve(**good | change)


def test_errors_say_what_is_missing():
    with pytest.raises(Infeasible, match="2 experts need 1 more slots: the devices hold 1"):
        place_exactly([[[1, 2], [3, 4]]], [1, 0], [0, 0])
    with pytest.raises(ValueError, match="stage must be"):
        place_exactly([[[1, 2], [3, 4]]], [1, 1], [0, 0], stage="devices_first")
    with pytest.raises(SolverUnavailable, match="unknown solver"):
        place_exactly([[[1, 2], [3, 4]]], [1, 1], [0, 0], solver="nonesuch")
    with pytest.raises(ValueError, match="whole numbers for CP-SAT"):
        place_with_cp_sat([[[1, 2], [3, 4]]], [1, 1], [0, 0], load=[[0.5, 1], [1, 1]], limit=[2, 2])


def random_fan_out(rng):
    layers, experts, devices = int(rng.integers(1, 3)), int(rng.integers(2, 7)), int(rng.integers(1, 4))
    top_k = int(rng.integers(1, min(experts, 4) + 1))
    ids = np.argsort(rng.random((int(rng.integers(1, 40)), layers, experts)), axis=2)[:, :, :top_k]
    capacity = random_capacity(rng, experts, devices)
    load = np.stack([np.bincount(ids[:, layer].ravel(), minlength=experts) for layer in range(layers)])
    limit = load.max(axis=1) * 1.5 if rng.random() < 0.5 else None
    arguments = (expert_sets(ids), experts, capacity, rng.integers(0, 2, devices), *WEIGHTS[rng.integers(len(WEIGHTS))])
    return ids, arguments, {"load": load, "limit": limit}


def test_fan_out_agrees_with_brute_force():
    rng = np.random.default_rng(1)
    solved = 0
    for _ in range(100):
        _, arguments, options = random_fan_out(rng)
        sets, experts, capacity, hosts, device_weight, host_weight = arguments
        problem = AffinityProblem.checked(
            np.zeros((len(sets) - 1, experts, experts)), capacity, hosts, device_weight, host_weight, **options
        )
        best = 0.0
        for layer, one in enumerate(sets):
            costs = [fan_out([row], [one], hosts, device_weight, host_weight) for row in layouts(problem, layer)]
            best += min(costs, default=np.inf)
        if np.isinf(best):
            with pytest.raises(Infeasible):
                place_by_fan_out(*arguments, **options)
            continue
        solver = "cp_sat" if solved % 3 == 0 else "highs"
        solution = place_by_fan_out(*arguments, **options, solver=solver)
        assert (solution.objective, solution.bound) == (pytest.approx(best), pytest.approx(best))
        assert solution.status == "optimal"
        assert problem.keeps(solution.assignment)
        again = place_by_fan_out(*arguments, **options, incumbent=solution.assignment)
        assert again.objective == pytest.approx(best)
        solved += 1
    assert solved > 50


def test_fan_out_counts_devices_and_hosts_of_every_token():
    rng = np.random.default_rng(2)
    ids, (sets, experts, capacity, hosts, *_), _ = random_fan_out(rng)
    placed = rng.integers(0, len(capacity), (ids.shape[1], experts))
    devices = sum(len(set(placed[layer, row[layer]])) for row in ids for layer in range(ids.shape[1]))
    reached = sum(len(set(hosts[placed[layer, row[layer]]])) for row in ids for layer in range(ids.shape[1]))
    assert fan_out(placed, sets, hosts, 1.0, 1.0) == devices
    assert fan_out(placed, sets, hosts, 1.0, 3.0) == devices + 2 * reached


def test_fan_out_returns_its_incumbent_with_a_bound_when_the_time_ends():
    rng = np.random.default_rng(4)
    ids = np.argsort(rng.random((300, 2, 32)), axis=2)[:, :, :4]
    incumbent = np.tile(np.repeat(np.arange(8), 4), (2, 1))
    solution = place_by_fan_out(
        expert_sets(ids), 32, [4] * 8, np.repeat([0, 1], 4), incumbent=incumbent, time_limit=0.02
    )
    assert solution.status == "time_limit"
    assert 2 * 300 <= solution.bound < solution.objective


def test_fan_out_refuses_bad_sets():
    for sets, message in (
        ([([[0, 0]], [1])], "distinct experts"),
        ([([[0, 5]], [1])], "distinct experts in 0..1"),
        ([([[0, 1]], [1, 2])], r"experts \[S, K\] and tokens"),
        ([([[0, 1]], [-1])], "finite and not negative"),
        ([], "at least one layer"),
    ):
        with pytest.raises(ValueError, match=message):
            place_by_fan_out(sets, 2, [1, 1], [0, 0])

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moeplan.solvers import Infeasible
from moeplan.solvers.balance import mean_balance
from moeplan.solvers.bounds.crossings import affinity_bounds
from moeplan.solvers.bounds.rows import LoadRows, Triangles
from moeplan.solvers.bounds.semidefinite import least_leaving
from moeplan.tests.affinity_cases import brute_force, capped_brute_force, layouts, random_case
from moeplan.tests.yardsticks.placement_problem import AffinityProblem

NAMES = ["slots", "matching", "spectral", "semidefinite", "triangle"]


def clustered(rng, layers, groups, size, loyalty):
    """(transitions, placement) of experts in hidden groups that tokens leave with probability 1 - loyalty."""
    experts = groups * size
    home = np.stack([rng.permutation(np.repeat(np.arange(groups), size)) for _ in range(layers)])
    transitions = np.zeros((layers - 1, experts, experts))
    for layer in range(layers - 1):
        same = home[layer][:, None] == home[layer + 1][None, :]
        transitions[layer] = np.where(same, loyalty / size, (1 - loyalty) / (experts - size))
    return transitions * rng.uniform(0.8, 1.2, transitions.shape), home


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 20, 60]))
@settings(max_examples=150, deadline=None)
def test_every_bound_is_below_the_optimum(seed, steps):
    arguments, options = random_case(np.random.default_rng(seed))
    options["together"] = None
    problem = AffinityProblem.checked(*arguments, **options)
    best = brute_force(problem)
    del options["together"]
    bounds = affinity_bounds(*arguments, **options, steps=steps)
    for name, bound in bounds.items():
        assert 0 <= bound <= best + 1e-9 * (1 + problem.transitions.sum()), name


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 20, 100]))
@example(80_000_000, 1)  # one sample has no load in a layer
@settings(max_examples=150, deadline=None)
def test_every_bound_under_a_cap_is_below_the_optimum(seed, steps):
    rng = np.random.default_rng(seed)
    (transitions, *arguments), options = random_case(rng, most=30)
    transitions = transitions[:2]
    layers, experts = len(transitions) + 1, transitions.shape[1]
    samples = np.round(rng.pareto(1.0, (rng.integers(1, 4), layers, experts)) * 5)
    problem = AffinityProblem.checked(transitions, *arguments, speed=options["speed"])
    coolest, hottest = balance_range(problem, samples)
    # Between the coolest and the hottest placement: some cap binds, some does not.
    cap = coolest + (hottest - coolest) * rng.choice([0.0, 0.05, 0.3, 1.0])
    best = capped_brute_force(problem, samples, cap)
    bounds = affinity_bounds(
        transitions, *arguments, speed=options["speed"], samples=samples, balance_cap=cap, steps=steps
    )
    for name, bound in bounds.items():
        assert 0 <= bound <= best + 1e-9 * (1 + problem.transitions.sum()), name


def test_a_cap_raises_the_bound():
    """Tokens never leave their group, but one group is hot in three layers of four, and cool where no cap binds."""
    transitions = np.stack([np.kron(np.eye(2), np.ones((3, 3)))] * 3) * np.repeat([3.0, 1.0], 3)[None, :, None]
    samples = np.stack([np.repeat([[9.0] * 3 + [3.0] * 3], 4, axis=0), np.repeat([[8.0] * 3 + [4.0] * 3], 4, axis=0)])
    samples[:, 3] = 1.0
    arguments = (transitions, [3, 3], [0, 0])
    problem = AffinityProblem.checked(*arguments, 1.0, 1.0)
    found = {}
    for cap in (1.32, 1.22, 1.14):
        bounds = affinity_bounds(*arguments, samples=samples, balance_cap=cap, steps=400)
        assert bounds["triangle"] <= capped_brute_force(problem, samples, cap) + 1e-9
        assert bounds["semidefinite"] == pytest.approx(0, abs=1e-6)
        found[cap] = bounds["triangle"]
    assert found[1.32] == pytest.approx(0, abs=1e-6)  # 1.3125 with the groups whole
    assert found[1.22] > 5
    assert found[1.14] > 1.5 * found[1.22]
    assert found[1.14] > 0.4 * capped_brute_force(problem, samples, 1.14)


def balance_range(problem, samples):
    """Mean balance of the coolest and of the hottest placement; every layer is placed by itself."""
    layers = [
        [mean_balance(row[None], samples[:, layer : layer + 1], problem.speed) for row in layouts(problem, layer)]
        for layer in range(problem.layers)
    ]
    return np.mean([min(layer) for layer in layers]), np.mean([max(layer) for layer in layers])


def test_bounds_are_close_on_small_cases():
    """What they miss of the optimum, over cases that are not free."""
    rng = np.random.default_rng(0)
    missed = {name: [] for name in NAMES}
    for _ in range(40):
        transitions = rng.integers(0, 20, (2, 6, 6)) ** 2
        arguments = (transitions, [2, 2, 2], [0, 1, 2])
        best = brute_force(AffinityProblem.checked(*arguments, 1.0, 1.0))
        for name, bound in affinity_bounds(*arguments, steps=300).items():
            missed[name].append(1 - bound / best)
    gap = {name: np.mean(values) for name, values in missed.items()}
    assert gap["slots"] > gap["matching"] > gap["semidefinite"] > gap["triangle"]
    assert gap["spectral"] > gap["semidefinite"]
    assert gap["triangle"] < 0.04


def test_a_hidden_clustering_is_nearly_proven_optimal():
    rng = np.random.default_rng(1)
    transitions, home = clustered(rng, 6, 4, 4, 0.7)
    crossing = AffinityProblem.checked(transitions, [4] * 4, [0, 0, 1, 1], 1.0, 1.0).movement(home)
    bounds = affinity_bounds(transitions, [4] * 4, [0, 0, 1, 1], steps=200)
    name, bound = max(bounds.items(), key=lambda entry: entry[1])
    assert name in ("semidefinite", "triangle")
    assert 0.98 * crossing < bound <= crossing


def test_device_and_host_bounds_add_up():
    rng = np.random.default_rng(2)
    transitions, _ = clustered(rng, 3, 4, 3, 0.6)
    capacity, hosts = [3] * 4, [0, 0, 1, 1]
    devices = affinity_bounds(transitions, capacity, hosts, 1.0, 1.0, steps=60)
    crossing_hosts = affinity_bounds(transitions, capacity, hosts, 0.0, 1.0, steps=60)
    both = affinity_bounds(transitions, capacity, hosts, 0.25, 2.25, steps=60)
    assert list(both) == NAMES
    for name in NAMES:
        assert both[name] == pytest.approx(0.25 * devices[name] + 2 * crossing_hosts[name], rel=1e-6)


def test_relaxations_only_get_tighter_and_more_steps_do_not_hurt():
    transitions = np.random.default_rng(3).pareto(1.0, (4, 12, 12))
    few = least_leaving(transitions, 4, 3, steps=40)
    many = least_leaving(transitions, 4, 3, steps=400)
    for bounds in (few, many):
        assert bounds["spectral"] <= bounds["semidefinite"] <= bounds["triangle"]
    assert all(few[name] <= many[name] for name in few)
    assert many["triangle"] > 1.01 * many["semidefinite"] > 1.02 * many["spectral"] > 0


def test_layers_are_bounded_together():
    """Three layers whose boundaries each allow a perfect grouping, but no two the same one: boundary by boundary,
    nothing need cross."""
    first = np.kron(np.eye(2), np.ones((2, 2)))  # {0, 1} and {2, 3} on both sides
    second = first[[0, 2, 1, 3]]  # {0, 2} and {1, 3}
    transitions = np.stack([first, second])
    best = brute_force(AffinityProblem.checked(transitions, [2, 2], [0, 0], 1.0, 1.0))
    apart = [max(affinity_bounds(transitions[i : i + 1], [2, 2], [0, 0], steps=200).values()) for i in range(2)]
    assert apart == [pytest.approx(0, abs=1e-6)] * 2
    assert 0.8 * best < max(affinity_bounds(transitions, [2, 2], [0, 0], steps=400).values()) <= best


def test_a_limit_raises_the_bound():
    """Tokens never leave their group, but one group is hot: a limit must break it up."""
    transitions = np.stack([np.kron(np.eye(2), np.ones((3, 3)))] * 3) * np.repeat([3.0, 1.0], 3)[None, :, None]
    load = np.repeat([[9.0] * 3 + [3.0] * 3], 4, axis=0)
    free = affinity_bounds(transitions, [3, 3], [0, 0], load=load, steps=100)
    assert max(free.values()) == pytest.approx(0, abs=1e-6)
    arguments = (transitions, [3, 3], [0, 0], 1.0, 1.0)
    options = {"load": load, "speed": None, "limit": np.full(4, 21.0)}
    best = brute_force(AffinityProblem.checked(*arguments, together=None, **options))
    capped = affinity_bounds(*arguments, **options, steps=400)
    assert 0.7 * best < capped["triangle"] <= best
    assert capped["semidefinite"] == pytest.approx(0, abs=1e-6)


def test_spare_and_uneven_slots():
    transitions, _ = clustered(np.random.default_rng(4), 4, 4, 3, 0.7)
    tight = max(affinity_bounds(transitions, [3] * 4, [0] * 4, steps=100).values())
    spare = max(affinity_bounds(transitions, [4] * 4, [0] * 4, steps=100).values())
    uneven = max(affinity_bounds(transitions, [4, 4, 3, 3], [0] * 4, steps=100).values())
    assert 0 < spare <= uneven * (1 + 1e-9)
    assert uneven < tight
    # A device without slots is none.
    assert max(affinity_bounds(transitions, [3] * 4 + [0], [0] * 5, steps=100).values()) == pytest.approx(tight)


def test_matching_knows_that_only_the_largest_places_are_large():
    transitions = np.ones((1, 8, 8))
    bounds = affinity_bounds(transitions, [4, 2, 1, 1], [0] * 4, steps=0)
    assert list(bounds) == ["slots", "matching"]
    assert bounds["slots"] == pytest.approx(32)
    assert bounds["matching"] == pytest.approx(64 - 16 - 4 - 1 - 1)


def test_nothing_moves_where_nothing_need():
    for transitions, capacity, hosts in (
        (np.zeros((2, 4, 4)), [2, 2], [0, 1]),  # no tokens
        (np.ones((0, 4, 4)), [2, 2], [0, 1]),  # one layer
        (np.ones((2, 4, 4)), [4], [0]),  # one device
        (np.ones((2, 4, 4)), [4, 4], [0, 1]),  # slots for all on one
    ):
        bounds = affinity_bounds(transitions, capacity, hosts, 1.0, 2.0)
        assert max(bounds.values()) == 0.0


def test_the_same_input_has_the_same_bounds_and_time_is_a_ceiling():
    transitions = np.random.default_rng(5).pareto(1.0, (4, 12, 12))
    arguments = (transitions, [3] * 4, [0, 0, 1, 1], 1.0, 3.0)
    assert affinity_bounds(*arguments, steps=60) == affinity_bounds(*arguments, steps=60)
    whole = affinity_bounds(*arguments, steps=400)
    short = affinity_bounds(*arguments, steps=400, time_limit=0.1)
    assert short["slots"] == whole["slots"]
    assert all(short[name] <= whole[name] * (1 + 1e-9) for name in short)
    assert list(affinity_bounds(*arguments, time_limit=1e-9)) == ["slots"]


def test_rows_are_violated_only_by_what_is_no_placement():
    """Prices of a placement stay 0; those of an intransitive Z rise."""
    rng = np.random.default_rng(6)
    for places in (2, 3):
        on = np.concatenate([rng.permutation(np.repeat(np.arange(places), 2)) for _ in range(2)])
        z = (on[:, None] == on[None, :]) - 1 / places
        load = rng.random((2, 2 * places))
        load *= places / load.sum(axis=1, keepdims=True)
        carried = np.stack([np.bincount(on[: 2 * places], load[0]), np.bincount(on[2 * places :], load[1])])
        for rows in (Triangles(1, 2 * places, places), LoadRows(load, carried.max(axis=1))):
            rows.separate(z[None])
            tax, constant = rows.ascend(z[None], 1.0)
            assert abs(tax).max() < 1e-12
            assert abs(constant) < 1e-12
        broken = z.copy()
        a, b = np.flatnonzero(on == on[0])[:2]
        broken[a, b] = broken[b, a] = -1 / places
        for rows in (Triangles(1, 2 * places, places), LoadRows(load, 0.9 * carried.max(axis=1))):
            rows.separate(broken[None])
            tax, constant = rows.ascend(broken[None], 1.0)
            assert (tax == tax.transpose(0, 2, 1)).all()
            # What is charged: more than 0 where Z breaks the rows, at most 0 where it keeps them.
            assert (tax * broken).sum() + constant > 0
            if isinstance(rows, Triangles):
                assert (tax * z).sum() + constant <= 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transitions": [[[1, np.nan], [0, 0]]]}, "transitions must be finite"),
        ({"capacity": [1.5, 1]}, "whole number of slots"),
        ({"device_weight": 2.0}, "0 <= device_weight <= host_weight, got 2.0 and 1.0"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"time_limit": 0}, "time_limit positive"),
        ({"limit": [1.0]}, "limit must hold"),
        ({"balance_cap": 1.2}, "balance_cap 1.2 needs samples"),
        ({"balance_cap": 1.2, "samples": [[1.0, 2.0]]}, "samples must be finite, non-negative"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"transitions": [[[1, 2], [3, 4]]], "capacity": [1, 1], "hosts": [0, 0]}
    with pytest.raises(ValueError, match=message):
        affinity_bounds(**good | change)


def test_missing_slots_are_counted():
    with pytest.raises(Infeasible, match="2 experts need 1 more slots"):
        affinity_bounds([[[1, 2], [3, 4]]], [1, 0], [0, 0])

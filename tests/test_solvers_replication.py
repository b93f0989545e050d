from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.solvers import Infeasible
from moeplan.solvers.bounds.replication import hottest_bound
from moeplan.solvers.exact.assignment import Assignment
from moeplan.solvers.exact.replication import replicate_exactly
from moeplan.solvers.replication.eplb import eplb
from moeplan.solvers.replication.replicate import checked, replicate
from moeplan.solvers.replication.shares import layer_shares, optimal_shares
from moeplan.solvers.slots import EMPTY, Slots

README = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)
EQUAL, TWO, HOSTS = np.ones(8), np.full(8, 2), np.arange(8) // 4


def random_case(seed, whole=False):
    """A layer that brute force can enumerate: (load [E], speed, capacity, hosts [G], groups)."""
    rng = np.random.default_rng(seed)
    groups = int(rng.choice([1, 2]))
    devices = int(rng.integers(2, 4)) if groups == 1 else int(rng.choice([2, 3]))
    hosts = np.sort(np.arange(devices) % 2)
    experts = groups * int(rng.integers(1, 3)) if groups > 1 else int(rng.integers(1, 5))
    while True:
        capacity = rng.integers(0, 4, devices)
        zone = hosts if groups > 1 else hosts * 0
        slots = np.bincount(zone, np.minimum(capacity, experts // (2 if groups > 1 else 1)))
        if (slots >= experts // (2 if groups > 1 else 1)).all():
            break
    load = rng.lognormal(2, 1.2, experts)
    speed = rng.choice([1.0, 2.0, 3.0], devices) if rng.random() < 0.5 else np.ones(devices)
    return (np.ceil(load) if whole else load), speed, capacity, hosts, groups


def brute_force(load, speed, capacity, hosts, groups, shares, full=False):
    """The coolest hottest device over all placements."""
    experts, count = len(load), int(hosts.max()) + 1
    options = []
    for slots in capacity:
        sizes = [min(slots, experts)] if full else range(min(slots, experts) + 1)
        options.append([held for size in sizes for held in combinations(range(experts), size)])
    best = np.inf
    for placed in product(*options):
        if len({e for held in placed for e in held}) < experts:
            continue
        if groups > 1:
            pairs = {(e * groups // experts, hosts[g]) for g, held in enumerate(placed) for e in held}
            if len(pairs) != groups or (np.bincount([h for _, h in pairs], minlength=count) != groups // count).any():
                continue
        at = np.array([e for held in placed for e in held])
        device = np.repeat(np.arange(len(placed)), [len(held) for held in placed])
        if shares == "optimal":
            best = min(best, layer_shares(at, device, load, speed)[1])
        else:
            best = min(best, (np.bincount(device, (load / np.bincount(at))[at], len(speed)) / speed).max())
    return best


def check(solution, load, speed, capacity, hosts, groups, full=False):
    """Rules (1) to (4), and the objective recomputed; load: [W, L, E]."""
    slots = solution.assignment
    assert slots.capacity.tolist() == list(capacity)
    objective = np.mean([slots.hottest(w, speed).sum() for w in load])
    assert solution.objective == pytest.approx(objective)
    assert solution.bound <= solution.objective
    experts = load.shape[2]
    if full:
        assert (slots.expert_of != EMPTY).sum(axis=1).tolist() == [np.minimum(capacity, experts).sum()] * len(load[0])
    if groups > 1:
        host = np.asarray(hosts)[slots.device_of_slot]
        for row in slots.expert_of:
            held = row != EMPTY
            pairs = set(zip((row[held] * groups // experts).tolist(), host[held].tolist(), strict=True))
            assert len(pairs) == groups
            assert len(set(np.bincount([h for _, h in pairs]).tolist())) == 1


@pytest.mark.parametrize("solver", ["highs", "cp_sat"])
def test_published_example_is_proven_with_even_shares(solver):
    replicate(README, EQUAL, TWO, HOSTS, groups=4, steps=1)  # compile first: a new installation does so once
    for groups, expected in ((4, [151, 179.5]), (1, [136, 172])):
        for row, optimum in zip(README, expected, strict=True):
            found = replicate_exactly(row, EQUAL, TWO, HOSTS, groups=groups, solver=solver)
            assert (found.objective, found.gap, found.status) == (optimum, 0, "optimal")
            assert found.seconds < 5


def test_published_example_is_proven_with_optimal_shares_under_groups():
    for row, optimum in zip(README, [147, 172.5], strict=True):
        found = replicate_exactly(row, EQUAL, TWO, HOSTS, groups=4, shares="optimal")
        assert found.objective == pytest.approx(optimum, rel=1e-9)
        assert (found.gap, found.status) == (0, "optimal")


@pytest.mark.parametrize(("groups", "expected"), [(4, [151, 179.5]), (1, [136, 172])])
def test_search_finds_the_published_examples_optimum(groups, expected):
    found = replicate(README, EQUAL, TWO, HOSTS, groups=groups, full=True)
    assert found.assignment.hottest(README, EQUAL) == pytest.approx(expected)
    check(found, README[None], EQUAL, TWO, HOSTS, groups, full=True)


@pytest.mark.parametrize("shares", ["even", "optimal"])
def test_exact_form_agrees_with_brute_force_and_the_search_is_close(shares):
    excess = []
    for seed in range(60):
        case = random_case(seed)
        expected = brute_force(*case, shares)
        exact = replicate_exactly(case[0], *case[1:4], groups=case[4], shares=shares)
        assert exact.status == "optimal"
        assert exact.objective == pytest.approx(expected, rel=2e-6), seed
        assert exact.bound <= expected * (1 + 1e-9)
        found = replicate(case[0][None], *case[1:4], groups=case[4], shares=shares, steps=5_000)
        check(found, case[0][None, None], *case[1:])
        assert found.bound <= expected * (1 + 1e-9)
        excess.append(found.objective / expected - 1)
    assert np.mean(excess) <= 0.02
    assert min(excess) >= -1e-9


def test_full_slots_agree_with_brute_force():
    for seed in range(40):
        case = random_case(seed)
        slots = np.minimum(case[2], len(case[0]) // (1 if case[4] == 1 else 2))
        expected = brute_force(case[0], case[1], slots, *case[3:], "even", full=True)
        exact = replicate_exactly(case[0], *case[1:4], groups=case[4], full=True)
        assert exact.objective == pytest.approx(expected, rel=2e-6), seed


@pytest.mark.parametrize("shares", ["even", "optimal"])
def test_both_exact_forms_and_both_back_ends_agree(shares):
    for seed in range(12):
        load, speed, capacity, hosts, groups = random_case(seed, whole=True)
        expected = replicate_exactly(load, speed, capacity, hosts, groups=groups, shares=shares).objective
        if shares == "even":
            other = replicate_exactly(load, speed, capacity, hosts, groups=groups, solver="cp_sat")
            assert other.objective == pytest.approx(expected, rel=2e-6), seed
        problem = checked(load[None], speed, capacity, hosts, groups, shares, False)
        for solver in ("highs", "cp_sat") if shares == "even" else ("highs",):
            program = Assignment(load[None], problem, np.zeros(1), load.sum() / speed.min())
            outcome, at = program.solve(solver, 0, 20.0)
            assert outcome.status == "optimal"
            assert outcome.bound == pytest.approx(expected, rel=1e-6), (seed, solver)
            assert at is not None


@given(st.integers(0, 10**6))
@settings(max_examples=60)
def test_every_bound_is_a_bound(seed):
    load, speed, capacity, hosts, groups = random_case(seed)
    need = len(load) // (1 if groups == 1 else 2)
    for shares in ("even", "optimal"):
        bound = hottest_bound(load[None], speed, np.minimum(capacity, need), hosts, groups, shares)[0]
        assert bound <= brute_force(load, speed, capacity, hosts, groups, shares) * (1 + 1e-9)


@pytest.mark.parametrize("shares", ["even", "optimal"])
@pytest.mark.parametrize("groups", [1, 8])
def test_heavy_tails_are_within_one_percent_of_proven_and_beat_eplb(shares, groups):
    load = np.random.default_rng(1).lognormal(0, 1.5, (4, 256))
    speed, capacity, hosts = np.ones(32), np.full(32, 9), np.arange(32) // 8
    found = replicate(load, speed, capacity, hosts, groups=groups, shares=shares, steps=30_000)
    assert found.gap <= 0.01
    greedy = eplb(load, 288, groups, 4 if groups > 1 else 1, 32).hottest(load, speed)
    assert (found.assignment.hottest(load, speed) < greedy).all()
    check(found, load[None], speed, capacity, hosts, groups)


def test_unequal_devices_are_used_for_what_they_are():
    load = np.random.default_rng(2).lognormal(0, 1, (3, 64))
    speed = np.where(np.arange(8) < 4, 1.0, 0.5)
    capacity = np.array([9, 9, 9, 4, 9, 9, 9, 15])
    found = replicate(load, speed, capacity, np.arange(8) // 4, steps=30_000)
    check(found, load[None], speed, capacity, np.arange(8) // 4, 1)
    assert found.gap <= 0.01


def test_windows_lower_the_mean_of_their_hottest_devices():
    rng = np.random.default_rng(3)
    windows = rng.gamma(2.0, rng.lognormal(0, 0.7, (2, 32)), (6, 2, 32))
    devices = (np.ones(8), np.full(8, 5), np.zeros(8, int))
    for shares in ("even", "optimal"):
        found = replicate(windows, *devices, shares=shares, steps=30_000)
        check(found, windows, *devices, 1)
        blind = replicate(windows.mean(axis=0), *devices, shares=shares, steps=30_000).assignment
        assert found.objective < np.mean([blind.hottest(w, devices[0]).sum() for w in windows])


def test_start_is_never_made_hotter_and_time_is_a_ceiling():
    load = np.random.default_rng(4).lognormal(0, 1, (3, 32))
    devices = (np.ones(8), np.full(8, 5), np.arange(8) // 4)
    start = Slots.even(eplb(load, 40, 4, 2, 8).expert_of, devices[1])  # copies put together: no longer even
    late = replicate(load, *devices, groups=4, start=start, time_limit=0.0)
    assert late.status == "time_limit"
    assert (late.assignment.hottest(load, devices[0]) <= start.hottest(load, devices[0]) * (1 + 1e-12)).all()
    found = replicate(load, *devices, groups=4, start=start, steps=20_000)
    assert found.objective < late.objective
    again = replicate(load, *devices, start=found.assignment, groups=4, steps=1_000)
    assert again.objective <= found.objective * (1 + 1e-12)


def test_same_seed_same_result():
    load = np.random.default_rng(5).lognormal(0, 1, (4, 32))
    runs = [replicate(load, np.ones(4), np.full(4, 10), np.zeros(4), seed=7, steps=5_000) for _ in range(2)]
    assert (runs[0].assignment.expert_of == runs[1].assignment.expert_of).all()
    assert runs[0].objective == runs[1].objective


def test_edges():
    one = replicate([[3.0]], [2.0], [4], [0])
    assert (one.objective, one.status) == (1.5, "optimal")
    idle = replicate(np.zeros((2, 4)), np.ones(2), [2, 3], [0, 0])
    assert (idle.objective, idle.gap) == (0, 0)
    more = replicate([[8.0, 1.0]], np.ones(2), [5, 5], [0, 0], full=True)  # two experts fill two slots of a device
    assert more.objective == 4.5
    none = replicate([[8.0, 1.0]], np.ones(3), [2, 0, 2], [0, 0, 1])
    assert none.assignment.finish([[8.0, 1.0]], np.ones(3))[0, 1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": [1, 1]}, "got 2: add slots"),
        ({"groups": 3}, "experts % groups"),
        ({"groups": 1, "shares": "uneven"}, "'even' or 'optimal'"),
        ({"groups": 4, "hosts": [0, 1], "capacity": [1, 4]}, "every host needs 2 slots"),
        ({"speed": [1, 0]}, "positive"),
        ({"hosts": [0]}, "hosts must"),
        ({"load": [[1, 2, np.nan, 3]]}, "finite"),
    ],
)
def test_bad_input_is_refused_with_a_reason(options, message):
    given_ = {"load": [[1, 2, 3, 4]], "speed": [1, 1], "capacity": [3, 3], "hosts": [0, 0]} | options
    with pytest.raises((Infeasible, ValueError), match=message):
        replicate(**given_)


def test_groups_must_divide_over_the_hosts():
    with pytest.raises(Infeasible, match="groups % hosts"):
        replicate([[1, 2, 3, 4]], np.ones(3), [4, 4, 4], [0, 1, 2], groups=2)


def test_too_many_divisions_of_the_groups_still_keep_the_rules():
    load = np.random.default_rng(6).lognormal(0, 1, (2, 64))
    devices = (np.where(np.arange(8) < 4, 1.0, 0.5), np.full(8, 9), np.arange(8) // 2)
    found = replicate(load, *devices, groups=32, steps=30_000)
    check(found, load[None], *devices, 32)
    assert found.gap <= 0.05


def test_uneven_start_is_made_even_where_shares_must_be():
    start = optimal_shares(eplb(README, 16, 1, 1, 8), README, EQUAL)
    late = replicate(README, EQUAL, TWO, HOSTS, start=start, time_limit=0.0)
    assert (Slots.even(late.assignment.expert_of, TWO).share_of == late.assignment.share_of).all()
    kept = replicate(README, EQUAL, TWO, HOSTS, start=start, time_limit=0.0, shares="optimal")
    assert (kept.assignment.hottest(README, EQUAL) <= start.hottest(README, EQUAL) * (1 + 1e-12)).all()


def test_start_that_breaks_the_groups_is_refused():
    with pytest.raises(ValueError, match="whole and even over the hosts"):
        replicate(README, EQUAL, TWO, HOSTS, groups=4, start=eplb(README, 16, 1, 1, 8))

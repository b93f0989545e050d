import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.solvers import Infeasible, NotFound
from moeplan.solvers.selection import select as select_module
from moeplan.solvers.selection.prices import price
from moeplan.solvers.selection.problem import checked
from moeplan.solvers.selection.select import select


def used_bytes(memory, shared, chosen):
    """[G] bytes of one selection, straight from the definition."""
    devices = memory.shape[2]
    own = [sum(int(memory[i, o, g]) for i, o in enumerate(chosen)) for g in range(devices)]
    regions = [
        sum(max(int(shared[i, o, f, g]) for i, o in enumerate(chosen)) for f in range(shared.shape[2]))
        for g in range(devices)
    ]
    return np.array(own) + np.array(regions, dtype=int)


def brute_force(cost, memory, capacity, shared):
    """(least cost or None, fewest bytes overstepped on each device alone, fewest in all)."""
    best, alone, together = None, np.full(len(capacity), 2**60), 2**60
    for chosen in product(range(cost.shape[1]), repeat=len(cost)):
        seconds = sum(cost[i, o] for i, o in enumerate(chosen))
        if not np.isfinite(seconds):
            continue
        over = np.maximum(used_bytes(memory, shared, chosen) - capacity, 0)
        alone, together = np.minimum(alone, over), min(together, int(over.sum()))
        if not over.any() and (best is None or seconds < best):
            best = seconds
    return best, alone, together


def random_case(rng):
    layers, options, regions, devices = (int(rng.integers(1, high)) for high in (6, 4, 3, 4))
    kinds = rng.integers(1, layers + 1)  # few kinds of layers: equal ones are joined
    of = rng.integers(0, kinds, layers)
    unit = int(rng.choice([1, 3, 10**9 + 7]))
    cost = (rng.integers(1, 20, (kinds, options)) * float(rng.choice([1.0, 1e-5])))[of]
    cost[(rng.random(cost.shape) < 0.15) & (np.arange(options) > 0)] = np.inf
    memory = rng.integers(0, 10, (kinds, options, devices))[of] * unit
    needs = rng.random((1, options, 1, 1)) < 0.6
    shared = (rng.integers(0, 15, (kinds, options, regions, devices)) * needs)[of] * unit
    capacity = rng.integers(2, 9, devices) * layers * unit + rng.integers(0, unit, devices)
    return cost, memory, capacity, shared


@pytest.mark.parametrize(("solver", "cases"), [("highs", 150), ("cp_sat", 150), ("cbc", 40)])
def test_equals_brute_force(solver, cases):
    rng = np.random.default_rng(0)
    feasible = 0
    for _ in range(cases):
        cost, memory, capacity, shared = random_case(rng)
        best, alone, together = brute_force(cost, memory, capacity, shared)
        if best is None:
            with pytest.raises(Infeasible) as error:
                select(cost, memory, capacity, shared=shared, solver=solver)
            assert error.value.unit == "bytes"
            assert error.value.missing <= together
            if "at least" in str(error.value):
                assert (np.array(error.value.per_device) <= alone).all()
            else:
                # Exact where the numbers are small; to a floating-point tolerance of the largest beyond.
                slack = int(1e-6 * (memory.max() + shared.max(initial=0)))
                assert together - slack <= error.value.missing
                assert together <= sum(error.value.per_device) <= together + slack
            continue
        feasible += 1
        solution = select(cost, memory, capacity, shared=shared, solver=solver)
        assert (used_bytes(memory, shared, solution.assignment) <= capacity).all()
        assert solution.objective == pytest.approx(sum(cost[i, o] for i, o in enumerate(solution.assignment)))
        assert solution.objective == pytest.approx(best, rel=1e-9)
        assert solution.bound <= best * (1 + 1e-9)
        assert solution.gap == pytest.approx(0, abs=1e-9)
        assert solution.status == "optimal"
    assert 0.2 * cases < feasible < 0.9 * cases


@given(st.integers(0, 2**32 - 1), st.floats(0.3, 1.0))
@settings(max_examples=25, deadline=None)
def test_more_memory_never_costs_more(seed, fraction):
    cost, memory, _, shared = random_case(np.random.default_rng(seed))
    ample = memory.max(axis=1).sum(axis=0) + shared.max(axis=(0, 1)).sum(axis=0)
    tight = (ample * fraction).astype(int)
    assert select(cost, memory, ample, shared=shared).objective == pytest.approx(cost.min(axis=1).sum())
    try:
        assert select(cost, memory, tight, shared=shared).objective >= cost.min(axis=1).sum() * (1 - 1e-9)
    except Infeasible as error:
        raised = tight + np.array(error.per_device)
        if "at least" not in str(error):  # what the closest selection lacks, granted, makes it feasible
            select(cost, memory, raised, shared=shared)


@pytest.mark.parametrize("solver", ["highs", "cp_sat"])
@pytest.mark.parametrize("equal", [True, False])
def test_94_layers_over_8_devices_are_quick_and_equal_runs_are_equal(solver, equal):
    rng = np.random.default_rng(1)
    jitter = np.ones((94, 1)) if equal else rng.uniform(0.9, 1.1, (94, 3))
    cost = np.array([[3e-3, 2e-3, 1e-3]]) * jitter
    memory = np.broadcast_to(np.array([400, 600, 900])[None, :, None] * 2**20, (94, 3, 8))
    shared = np.zeros((94, 3, 1, 8), int)
    shared[:, 2] = 5 * 2**30
    capacity = np.full(8, 60 * 2**30) - rng.integers(0, 2**30, 8)
    started = time.process_time()
    first = select(cost, memory, capacity, shared=shared, solver=solver)
    assert time.process_time() - started < 10
    assert first.status == "optimal"
    assert first.gap < 1e-9
    again = select(cost, memory, capacity, shared=shared, solver=solver)
    assert again.assignment == first.assignment
    if equal:
        # 94 * 400 MiB fit. With a region of 5 GiB, 55 GiB less up to 1 remain: 500 MiB more per option 2.
        assert first.objective == pytest.approx(best_of_equal_layers(capacity.min()))


def best_of_equal_layers(capacity):
    values = []
    for second in range(95):
        for third in range(95 - second):
            mib = 400 * (94 - second - third) + 600 * second + 900 * third + (5120 if third else 0)
            if mib * 2**20 <= capacity:
                values.append(94 * 3e-3 - second * 1e-3 - third * 2e-3)
    return min(values)


def test_a_region_is_charged_once_at_its_largest():
    cost, memory = np.array([[2.0, 1.0]] * 3), np.zeros((3, 2, 1), int)
    shared = np.zeros((3, 2, 1, 1), int)
    shared[:, 1, 0, 0] = [5, 7, 9]
    assert select(cost, memory, [9], shared=shared).assignment == (1, 1, 1)
    assert select(cost, memory, [8], shared=shared).assignment == (1, 1, 0)
    assert select(cost, memory, [4], shared=shared).assignment == (0, 0, 0)


@pytest.mark.parametrize("solver", ["highs", "cbc", "cp_sat"])
def test_a_single_byte_too_much_is_refused(solver):
    # Within any floating-point tolerance 10**12 + 1 bytes fit into 10**12; they do not.
    cost, memory = [[1.0, 2.0], [1.0, 2.0]], np.array([[[5 * 10**11], [3]], [[5 * 10**11 + 1], [3]]])
    assert select(cost, memory, [10**12 + 1], solver=solver).assignment == (0, 0)
    solution = select(cost, memory, [10**12], solver=solver)
    assert sorted(solution.assignment) == [0, 1]
    assert (solution.objective, solution.bound) == (3.0, 3.0)


def test_infeasible_says_what_each_device_lacks_at_least():
    with pytest.raises(Infeasible, match="device 1 lacks at least 15 bytes") as error:
        select([[1.0, 1.0]] * 3, [[[10, 20], [30, 5]]] * 3, [40, 0])
    assert error.value.per_device == (0, 15)
    with pytest.raises(Infeasible, match="oversteps device 1 by 10 bytes") as error:  # either device alone would do
        select([[1.0, 1.0]] * 2, [[[10, 20], [30, 5]]] * 2, [40, 15])
    assert (error.value.per_device, error.value.missing) == ((0, 10), 10)
    with pytest.raises(Infeasible, match="layer 1 has no option") as error:
        select([[1.0], [np.inf]], np.zeros((2, 1, 1), int), [1])
    assert error.value.unit == "options"


def test_memory_already_overspent_is_infeasible_not_bad_input():
    with pytest.raises(Infeasible, match="lacks at least 8 bytes"):
        select([[1.0]], [[[3]]], [-5])


def test_time_limit_without_a_solution_says_so():
    rng = np.random.default_rng(2)
    cost, memory = rng.random((60, 8)), rng.integers(10**6, 10**9, (60, 8, 12))
    with pytest.raises(NotFound, match=r"highs found no solution within 0\.01 s: raise the time limit"):
        select(cost, memory, memory.min(axis=1).sum(axis=0) * 2, time_limit=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost": [1.0, 2.0]}, "cost must be"),
        ({"cost": [[1.0, np.nan]]}, "cost must hold"),
        ({"cost": [[1.0, -1.0]]}, "cost must hold"),
        ({"memory": [[[1, 1]]]}, r"memory must have shape \[1, 2, 2\], got \[1, 1, 2\]"),
        ({"memory": [[[1.5, 1], [1, 1]]]}, "memory must be whole bytes"),
        ({"memory": [[[-1, 1], [1, 1]]]}, "memory must not be negative"),
        ({"memory": [[[2**61, 1], [1, 1]]]}, "add up to more"),
        ({"capacity": [[1, 1]]}, "capacity must have shape"),
        ({"shared": [[[[1]], [[1]]]]}, "shared must have shape"),
    ],
)
def test_bad_input(change, message):
    good = {"cost": [[1.0, 2.0]], "memory": [[[1, 1], [1, 1]]], "capacity": [1, 1]}
    with pytest.raises(ValueError, match=message):
        select(**(good | change))


def test_prices_bound_every_choice_and_keep_what_a_better_one_has():
    rng = np.random.default_rng(1)
    tight = 0
    for _ in range(150):
        case = random_case(rng)
        cost, memory, capacity, shared = case
        best = brute_force(*case)[0]
        if best is None:
            continue
        problem = checked(cost, memory, capacity, shared).by_kind().undominated()
        found = price(problem, 0.0)
        assert found.bound <= best * (1 + 1e-9)
        assert found.seconds >= best * (1 - 1e-9)
        if found.chosen is not None:
            assert problem.fits(found.chosen)
            tight += found.seconds <= best * (1 + 1e-9)
        left = np.where(found.open, problem.cost, np.inf)[problem.of_layer]
        assert brute_force(left, memory, capacity, shared)[0] == pytest.approx(best)
    assert tight > 30


def test_a_gap_or_a_target_spares_the_program(monkeypatch):
    """A choice within the gap is taken, and none is looked for that could not cost less than the target."""
    monkeypatch.setattr(select_module, "_exact", lambda *arguments: pytest.fail("a program was solved"))
    cost = np.array([[1.0, 1.1]] * 5)
    memory = np.array([[[7], [4]]] * 5)
    loose = select(cost, memory, [27], gap=0.5)
    assert loose.bound <= loose.objective <= 1.5 * loose.bound
    assert select(cost, memory, [27], target=0.0).objective == loose.objective

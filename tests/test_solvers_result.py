import pytest

from moeplan.solvers import Infeasible, Solution


def test_gap_is_relative_to_the_objective_and_zero_where_equal():
    assert Solution((1,), 4.0, 3.0, "feasible", 0.0).gap == 0.25
    assert Solution((1,), 4.0, 4.0, "optimal", 0.0).gap == 0.0
    assert Solution((1,), 0.0, 0.0, "optimal", 0.0).gap == 0.0
    assert Solution((1,), 4.0, 0.0, "feasible", 0.0).gap == 1.0


def test_rounding_between_bound_and_objective_is_no_gap():
    assert Solution((1,), 4.0, 4.0 * (1 - 1e-12), "optimal", 0.0).gap == 0.0
    assert Solution((1,), 4.0, 4.0 * (1 + 1e-8), "optimal", 0.0).bound == 4.0
    assert Solution((1,), 4.0, 4.0 * (1 - 1e-6), "time_limit", 0.0).gap > 0


def test_a_bound_above_the_objective_is_a_bug():
    with pytest.raises(AssertionError, match="not a bound"):
        Solution((1,), 4.0, 4.1, "optimal", 0.0)


def test_a_heuristic_is_optimal_only_where_the_bound_proves_it():
    assert Solution.from_heuristic((1,), 4.0, 4.0, 0.0).status == "optimal"
    assert Solution.from_heuristic((1,), 4.0, 3.9, 0.0).status == "feasible"


def test_infeasible_carries_numbers():
    error = Infeasible("3 bytes", unit="bytes", missing=3, per_device=(0, 3))
    assert (str(error), error.unit, error.missing, error.per_device) == ("3 bytes", "bytes", 3, (0, 3))

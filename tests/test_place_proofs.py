"""What `moeplan place` proves and says of small cases, through the command."""

import json
import sys

import numpy as np
import pytest

from moeplan.service import cli
from moeplan.solvers.balance import balance_bound, mean_balance
from moeplan.solvers.result import Infeasible
from moeplan.spec.balance import balance, over_ideal
from moeplan.spec.placement import Placement
from moeplan.spec.trace import Trace
from moeplan.tests.exact_cases import random_ids


@pytest.fixture
def moeplan(capfd, tmp_path, monkeypatch):
    """Run a command in a folder: exit code, standard output, standard error without line breaks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["moeplan", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capfd.readouterr()
        return stopped.value.code, captured.out, " ".join(captured.err.split())

    return run


README = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]


@pytest.mark.parametrize(("groups", "hottest"), [(4, (151, 179.5)), (1, (136, 172))])
def test_eplb_readme_is_proven(moeplan, groups, hottest):
    Trace.of_counts(np.array(README)).write("eplb.npz")
    options = ("--devices", "8", "--hosts", "2", "--slots", "16", "--groups", groups, "--time-limit", "120")
    code, out, _ = moeplan("place", "--trace", "eplb.npz", *options)
    assert code == 0
    assert "proven optimal by exact program (HiGHS)" in " ".join(out.split())
    solver = Placement.read("place.json").solver
    ideal = np.sum(README, axis=1) / 8
    assert solver.objective == pytest.approx(np.mean(np.array(hottest) / ideal))
    assert (solver.gap, solver.status) == (0, "optimal")


def test_full_slots_and_whole_counts_are_known_to_the_bound(moeplan):
    Trace.of_counts(np.array([[5, 4, 3, 2, 1, 1, 1, 1]])).write("one.npz")
    code, out, _ = moeplan("place", "--trace", "one.npz", "--devices", "4")
    assert code == 0
    assert "proven optimal" in " ".join(out.split())
    solver = Placement.read("place.json").solver
    assert solver.bounds["balance"] == solver.objective == pytest.approx(6 / 4.5)
    # One copy on each of two devices: heaviest and lightest are together, or three are.
    assert balance_bound(np.array([3.0, 1, 1, 1]), np.ones(2), np.array([2, 2])) <= 4


def test_a_layer_without_tokens_counts_one_everywhere(moeplan):
    Trace.of_counts(np.array([[0] * 8, [5, 4, 3, 2, 1, 1, 1, 1]])).write("empty.npz")
    code, _, _ = moeplan("place", "--trace", "empty.npz", "--devices", "4")
    assert code == 0
    placed, expected = Placement.read("place.json"), (1 + 6 / 4.5) / 2
    assert placed.solver.objective == placed.solver.bound == pytest.approx(expected)
    assert placed.scores["placement"].fit.balance_mean == pytest.approx(expected)
    _, out, _ = moeplan("explain", "place.json", "--trace", "empty.npz", "--json")
    slot = json.loads(out)["explanation"]["one_more_slot"]
    assert slot["now"] == slot["same_slots"] == slot["same_slots_bound"] == pytest.approx(expected)
    _, out, _ = moeplan("trace", "stats", "empty.npz", "--devices", "4", "--json")
    stats = json.loads(out)["device_imbalance"]
    assert stats == [1.0, 2.0]
    assert np.mean(stats) == pytest.approx(placed.scores["linear"].fit.balance_mean)
    _, out, _ = moeplan("compare", "place.json", "place.json", "--trace", "empty.npz", "--json")
    assert json.loads(out)["a"]["fit"]["balance_mean"] == pytest.approx(expected)


def test_empty_layers_of_samples_do_not_loosen_or_tighten_a_cap():
    """Three devices for eight experts: evenly loaded experts would not be balanced, no experts are."""
    load = np.array([[[0.0] * 8, [3, 2, 2, 1, 1, 1, 1, 1]], [[0] * 8, [1, 1, 1, 1, 1, 1, 1, 1]]])
    placed = np.tile([0, 0, 0, 1, 1, 1, 2, 2], (2, 1))
    per_device = np.stack([[np.bincount(d, w, 3) for d, w in zip(placed, sample, strict=True)] for sample in load])
    assert mean_balance(placed, load, np.ones(3)) == pytest.approx(float(balance(per_device).mean()))
    assert balance(np.zeros((2, 3))).tolist() == [1, 1]
    assert over_ideal([0.0, 0.0]).tolist() == [1, 1]
    assert over_ideal([4.0, 2.0], [2.0, 1.0]).tolist() == [1, 1]


def test_constant_routing_moves_nothing_and_is_warned_of(moeplan):
    Trace.of(np.broadcast_to([[0, 1], [2, 3]], (64, 2, 2)).copy(), 4).write("same.npz")
    code, out, err = moeplan("place", "--trace", "same.npz", "--devices", "2")
    assert code == 0
    assert "0 = " in out
    assert "proven optimal" in " ".join(out.split())
    assert "all 64 tokens choose the same experts in every layer" in err
    solver = Placement.read("place.json").solver
    assert (solver.objective, solver.bound, solver.gap) == (0, 0, 0)
    assert "same experts in every layer" in moeplan("trace", "stats", "same.npz", "--devices", "2")[2]


@pytest.mark.parametrize("padding", [0.1, 0.5])
def test_padding_is_warned_of_and_chance_is_not(moeplan, padding):
    rng = np.random.default_rng(0)
    ids = random_ids(rng, 200, 4, 8, 2)
    ids[rng.random(200) < padding] = ids[0]
    Trace.of(ids, 8).write("t.npz")
    warned = "of the tokens choose the same experts" in moeplan("trace", "stats", "t.npz")[2]
    assert warned == (padding > 0.25)
    one_layer = np.zeros((100, 1, 1), int)
    one_layer[:40] = 1
    Trace.of(one_layer, 4).write("u.npz")  # more than half choose expert 0, as its load says
    assert "same experts" not in moeplan("trace", "stats", "u.npz", "--devices", "4")[2]


def test_an_impossible_cap_is_refused_with_its_proof(moeplan):
    Trace.of(random_ids(np.random.default_rng(1), 40, 2, 4, 1), 4).write("t.npz")
    code, _, err = moeplan("place", "--trace", "t.npz", "--devices", "2", "--balance-cap", "1")
    assert code == 2
    assert "no placement has a mean balance of 1 or less: it is proven to be at least" in err
    assert issubclass(Infeasible, Exception)

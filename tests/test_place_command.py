"""The command ``moeplan place``: what it writes and prints, and bad input as a person would give it."""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.service import cli
from moeplan.service.pages.placement import verdict
from moeplan.solvers.placement.annealing import anneal
from moeplan.solvers.result import NotFound
from moeplan.spec.placement import Placement
from moeplan.spec.trace import Trace
from moeplan.tests.routings import random_trace, topics_trace

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def moeplan(capfd: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in a folder with a trace: exit code, standard output, standard error without line breaks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    topics_trace(0, 3, 8)[0].write("t.npz")

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeplan", "place", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capfd.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, captured.out, " ".join(captured.err.split())

    return run


USUAL = ("--trace", "t.npz", "--devices", "4", "--hosts", "2", "--time-limit", "1")
ENOUGH = ("--steps", "2000", "--time-limit", "60")  # for all the steps, and a picture, on a slow machine too


def test_it_writes_a_placement_and_says_how_good_it_is(moeplan):
    code, out, err = moeplan(*USUAL, "--fit", "0:0.5")
    assert code == 0
    assert "EPLB" in out
    assert "held out" in out
    assert "wrote place.json" in out
    assert "200 tokens are few to trust for 8 experts: about 1000 are needed" in err
    found = Placement.read("place.json")
    assert found.trace.path == "t.npz"
    assert found.trace.fit == (0.0, 0.5)
    assert found.trace.digest == Trace.read("t.npz").digest()
    assert set(found.scores) == {"placement", "linear", "eplb"}


def test_json_is_the_placement_alone(moeplan):
    code, out, _ = moeplan(
        *USUAL, "--objective", "balance", "--slots", "12", "--equal-slots", "-o", "a/b.json", "--json"
    )
    assert code == 0
    shown, written = json.loads(out), json.loads(Path("a/b.json").read_text())
    assert shown == {k: v for k, v in written.items() if k not in ("kind", "version")}
    assert {len(device) for layer in shown["layers"] for device in layer["slots"]} == {3}


def test_moves_against_a_previous_placement_are_counted(moeplan):
    random_trace(0, 32, 8, 50).write("t.npz")  # of mixtral's shape
    moeplan(*USUAL, "--objective", "balance", "-o", "old.json")
    code, out, _ = moeplan(*USUAL, "--previous", "old.json", "--max-moves", "4", "--model", "mixtral")
    assert code == 0
    assert "Against old.json," in " ".join(out.split())
    moves = Placement.read("place.json").moves
    assert moves is not None
    assert moves.copies <= moves.limit == 4
    assert moves.bytes is not None


def test_counts_serve_balance_and_say_so(moeplan):
    Trace.of_counts(random_trace(0, 2, 8).expert_counts).write("t.npz")
    code, out, err = moeplan(*USUAL)
    assert code == 0
    assert "the trace has counts only: balance is planned, affinity between layers is unknown" in err
    assert "objective latency needs expert_ids per token: balance was planned instead" in err
    assert "x host" not in out


@pytest.mark.parametrize("slots", [None, 192])
def test_out_of_time_is_marked(moeplan, slots):
    random_trace(0, 24, 128, 400).write("t.npz")
    code, out, _ = moeplan(*USUAL, *(("--slots", slots) if slots else ()))
    assert code == 0
    assert "The time limit ended the search; a longer --time-limit may help." in " ".join(out.split())
    assert "ms: predicted" not in " ".join(out.split())  # no such column without a cluster
    assert Placement.read("place.json").solver.status == "time_limit"


@pytest.mark.parametrize("in_time", [False, True])
def test_no_time_for_hosts_leaves_them_as_even_as_greedy(moeplan, monkeypatch, in_time):
    def nothing(*arguments, balance_cap, **options):
        if balance_cap < math.inf:
            raise NotFound("found no placement with a balance of 1.1", in_time=in_time)
        return anneal(*arguments, **options)

    monkeypatch.setattr("moeplan.planner.place.single.anneal", nothing)
    code, _, err = moeplan(*USUAL, *ENOUGH, "--slots", "12")
    if in_time:  # more time would not help
        assert code == 2
        assert "found no placement with a balance of 1.1" in err
    else:
        assert code == 0
        assert Placement.read("place.json").solver.status == "time_limit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--slots", "10", "--equal-slots"),
            r"10 slots do not divide over 4 devices.*SGLang \(physical experts % ep_size\).*use --slots 12 \(or 8\)",
        ),
        (("--slots", "6"), "8 experts need 8 slots, got 6: raise --slots"),
        (("--slots", "2"), "2 slots on 4 devices: every device needs one"),
        ((*ENOUGH, "--balance-cap", "1.000001", "--devices", "3"), r"it is proven to be at least 1\.\d+"),
        (("--balance-cap", "0.5"), "the hottest device over the mean is at least 1"),
        (("--balance-cap", "nan"), "the hottest device over the mean is at least 1"),
        (("--balance-cap", "inf"), "the hottest device over the mean is at least 1"),
        (("--max-moves", "3"), "--max-moves needs --previous"),
        (("--previous", "missing.json"), "missing.json: no such file; make one with `moeplan place`"),
        (("--groups", "3"), "experts % groups == 0 is broken: 8 experts in 3 groups"),
        (("--groups", "4", "--hosts", "3"), "groups % hosts == 0 is broken: 4 groups on 3 hosts"),
        (("--hosts", "5"), "need at least 1 device and 1 to 4 hosts, got 4 and 5"),
        (("--fit", "half"), "--fit half: expected FROM:TO as fractions of the trace, such as 0:0.5"),
        (("--fit", "0:nan"), "expected 0 <= from < to <= 1"),
        (("--fit", "0:0.0001"), "holds no tokens"),
        (("--fit", "0:0.006"), "2 tokens cannot say how 8 experts are used: record about 1000 tokens"),
        (("--trace", "none.npz"), "none.npz: no such file"),
        (("--objective", "speed"), "'speed' is not one of 'latency', 'locality'"),
        (("--time-limit", "0"), "greater than or equal to 1"),
        (("--model", "gpt-5"), "gpt-5"),
        (("--pareto", "f.png", "--slots", "12"), "--pareto is for single copies"),
        (
            ("--workload", "prefill:64"),
            "^error: --workload needs --cluster: without one no time is predicted$",
        ),
        (("--workload", "prefill:2048"), "--workload needs --cluster"),  # the default, but asked for
        (("--dtype", "bf16"), "--dtype needs --cluster"),
        (("--workload", "soon"), "soon"),
        (("--workload", ""), "workload ''"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_refused_in_words(moeplan, options, message):
    code, out, err = moeplan(*USUAL, *options)
    assert code == 2
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert not out
    assert not Path("place.json").exists()


def test_a_previous_placement_of_another_shape_is_refused(moeplan):
    moeplan(*USUAL, "--objective", "balance", "-o", "old.json")
    topics_trace(0, 2, 8)[0].write("other.npz")
    code, _, err = moeplan(*USUAL, "--trace", "other.npz", "--previous", "old.json")
    assert (code, "--previous has 3 layers x 8 experts, the trace 2 x 8" in err) == (2, True)
    code, _, err = moeplan(*USUAL, "--devices", "2", "--previous", "old.json")
    assert (code, "--previous is for 4 devices, not 2" in err) == (2, True)


def test_pareto_draws_and_joins_the_json_but_not_the_file(moeplan):
    code, out, _ = moeplan(*USUAL, *ENOUGH, "--fit", "0:0.5", "--pareto", "front.png", "--json")
    assert code == 0
    shown: dict[str, Any] = json.loads(out)
    front = shown.pop("pareto")
    assert shown == {
        k: v for k, v in json.loads(Path("place.json").read_text()).items() if k not in ("kind", "version")
    }
    assert {point["name"] for point in front["points"]} >= {"placement", "linear", "eplb"}
    assert front["part"] == "held_out"
    from matplotlib.image import imread

    assert np.ptp(imread("front.png")) > 0.5


def test_a_model_of_another_shape_is_refused_with_both_numbers(moeplan):
    code, _, err = moeplan(*USUAL, "--model", "mixtral")
    assert code == 2
    assert "t.npz: has 3 layers x 8 experts, top-2; mixtral has 32 x 8, top-2" in err.lower()
    assert not Path("place.json").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--devices", "3", "--equal-slots"), r"use --slots 9, or other --devices$"),  # 6 would be below 8 experts
        (("--devices", "3", "--slots", "10", "--equal-slots"), r"use --slots 12 \(or 9\)"),
        (("--devices", "10"), r"use --slots 10 or more, which copies experts, or at most 8 devices"),
        (("--slots-per-device", "3,4"), r"8 experts need 8 slots, got 7"),
        (("--slots-per-device", "3,x"), r"--slots-per-device 3,x: expected a whole number from 1 for each device"),
        (("--slots-per-device", "3,0,9"), r"expected a whole number from 1"),
        (("--slots-per-device", "3,5", "--devices", "4"), r"3,5 is for 2 devices, --devices says 4"),
        (("--slots-per-device", "3,5", "--slots", "9"), r"3,5 are 8 slots, --slots says 9"),
        (("--slots-per-device", "3,5", "--equal-slots"), r"does not go with --equal-slots"),
    ],
)
def test_hints_can_be_followed(moeplan, options, reason):
    code, out, err = moeplan("--trace", "t.npz", *options)
    assert code == 2
    assert not out
    assert re.search(reason, err), err
    assert not Path("place.json").exists()


def test_uneven_slots_without_a_cluster(moeplan):
    code, _, err = moeplan("--trace", "t.npz", "--slots-per-device", "3,5", "--hosts", "2", "--objective", "balance")
    assert code == 0
    assert "EPLB is not compared: EPLB gives every device 4 slots, and device 0 has 3" in err
    placed = Placement.read("place.json")
    assert [device.capacity for device in placed.devices] == [3, 5]
    assert all([len(held) for held in layer.slots] == [3, 5] for layer in placed.layers)


def test_slots_that_cannot_be_used_and_a_missing_eplb_are_told(moeplan):
    code, _, err = moeplan("--trace", "t.npz", "--devices", "4", "--slots", "40", "--objective", "balance")
    assert code == 0
    assert "40 slots are asked for, 32 can be used" in err
    code, _, err = moeplan("--trace", "t.npz", "--devices", "3", "--objective", "balance")
    assert code == 0
    assert "EPLB is not compared: EPLB needs slots % devices == 0: got 8 slots and 3 devices" in err


def test_copies_that_eplb_puts_beside_each_other_are_told(moeplan):
    Trace.of_counts(np.array([[100, 1, 1, 1]])).write("t.npz")
    code, _, err = moeplan("--trace", "t.npz", "--devices", "2", "--slots", "8")
    assert code == 0
    assert re.search(r"EPLB puts \d+ copies, of 8, on a device that holds the same expert already", err), err


def test_ctrl_c_is_not_put_down_to_the_time_limit(moeplan):
    random_trace(0, 24, 128, 400).write("t.npz")
    code, _, _ = moeplan(*USUAL)
    assert code == 0
    placement = Placement.read("place.json")
    assert placement.solver.status == "time_limit"
    assert "Ctrl-C ended the search." in verdict(placement, stopped=True)
    assert "time limit" not in verdict(placement, stopped=True)

"""The command ``moeplan calibrate``: what it writes and prints, and bad input as a person would give it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeplan.profiler.serving_results import read_served
from moeplan.service import cli
from moeplan.spec.calibration import Calibration
from moeplan.spec.plan import Plan
from moeplan.spec.serving import ServingPlan
from moeplan.tests.documents import plan_body

Run = Callable[..., tuple[int, str, str]]
PREDICTED = "isl,osl,concurrency,ttft_ms,tpot_ms\n1024,1024,16,100,10\n1024,1024,64,300,20\n1024,1024,128,600,30\n"
MEASURED = "isl,osl,concurrency,ttft_ms,tpot_ms\n1024,1024,16,180,12\n1024,1024,64,500,25\n"


@pytest.fixture
def moeplan(capfd: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    Path("p.csv").write_text(PREDICTED)
    Path("m.csv").write_text(MEASURED)

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeplan", "calibrate", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capfd.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, captured.out, " ".join(captured.err.split())

    return run


@pytest.fixture
def served_plan() -> ServingPlan:
    memory = {"weights": 1, "cache": 1, "activations": 1, "overhead": 1, "limit": 9}
    degrees = dict.fromkeys(("tp", "dp", "moe_tp", "moe_ep", "pp"), 1)
    stage = {"kind": "a", "per_host": 1, "gpus": 1, "layers": 2, "memory": memory}

    def replica(share: float, ttft: float, tpot: float) -> dict[str, Any]:
        each = {"ttft_s": ttft, "tpot_s": tpot, "tokens_per_s": 1.0, "tokens_per_s_per_gpu": 1.0}
        return {"count": 1, "degrees": degrees, "stages": [stage], "concurrency": 16, "share": share, "each": each}

    first, second = replica(0.75, 0.1, 0.01), replica(0.25, 0.2, 0.02)
    body = {
        "model": "m",
        "engine": "vllm",
        "precision": "fp8",
        "load": {"isl": 1024, "osl": 512, "concurrency": 32},
        "replicas": [first, second],
        "predicted": second["each"],
        "requests_per_s": 1.0,
        "gpus": 2,
        "gpus_there": 2,
        "solver": {"status": "optimal", "objective": 1.0, "bound": 1.0, "forms": 1, "offers": 1},
    }
    return ServingPlan.model_validate(body)


def test_it_writes_the_correction_and_the_corrected_predictions(moeplan):
    code, out, err = moeplan("p.csv", "--measured", "m.csv", "--corrected", "c.csv")
    assert (code, err) == (0, "")
    assert "corrected by the others alone" in out
    found = Calibration.read("calibration.json")
    assert found.compute_scale > 1
    assert found.prefill_scale > 1.3
    before, after = read_served("p.csv"), read_served("c.csv")
    assert [t.tpot_ms for t in after] == pytest.approx([found.tpot_ms(t.tpot_ms or 0) for t in before], rel=1e-5)
    assert [t.ttft_ms for t in after] == pytest.approx([found.ttft_ms(t.ttft_ms or 0) for t in before], rel=1e-5)
    assert found.error_left_out.tpot is not None
    assert found.error_before.tpot is not None
    assert found.error_left_out.tpot < found.error_before.tpot


def test_json_is_the_document_alone(moeplan):
    code, out, _ = moeplan("p.csv", "--measured", "m.csv", "--json", "-o", "x/y.json")
    assert code == 0
    written = json.loads(Path("x/y.json").read_text())
    assert json.loads(out) == {k: v for k, v in written.items() if k not in ("kind", "version")}


def test_one_point_says_that_the_error_is_not_known(moeplan):
    Path("m.csv").write_text("\n".join(MEASURED.splitlines()[:2]))
    code, out, err = moeplan("p.csv", "--measured", "m.csv")
    assert code == 0
    assert "one point alone cannot say" in out
    assert "measure a second" in err


def test_points_of_several_files_and_loads_that_are_not_predicted(moeplan):
    Path("n.csv").write_text("isl,osl,concurrency,tpot_ms\n99,1024,16,12\n1024,1024,128,33\n")
    code, _, err = moeplan("p.csv", "--measured", "m.csv", "--measured", "n.csv")
    assert code == 0
    assert "1 of 4 measurements are of loads that are not predicted" in err
    assert len(Calibration.read("calibration.json").points) == 3


def test_a_plan_is_corrected_by_a_measurement_of_its_load(moeplan):
    Plan.model_validate(plan_body()).write("plan.json")
    Path("m.csv").write_text("isl,osl,concurrency,tpot_ms\n2,2,6,130\n")
    assert moeplan("plan.json", "--measured", "m.csv")[0] == 0
    assert 1 < Calibration.read("calibration.json").compute_scale < 1.3


def test_a_served_plan_is_corrected_by_a_measurement_of_its_load(moeplan, served_plan):
    """Two replicas that share the requests 3 to 1."""
    served_plan.write("served.json")
    Path("m.csv").write_text("isl,osl,concurrency,ttft_ms,tpot_ms\n1024,512,32,150,20\n")
    assert moeplan("served.json", "--measured", "m.csv")[0] == 0
    (point,) = Calibration.read("calibration.json").points
    assert (point.predicted.ttft_ms, point.predicted.tpot_ms) == pytest.approx((0.75 * 100 + 0.25 * 200, 12.5))


def test_a_served_plan_without_times_is_refused_in_words(moeplan, served_plan):
    each = served_plan.replicas[0].each.model_copy(update={"ttft_s": 0.0, "tpot_s": 0.0})
    replicas = tuple(r.model_copy(update={"each": each}) for r in served_plan.replicas)
    served_plan.model_copy(update={"replicas": replicas}).write("served.json")
    code, _, err = moeplan("served.json", "--measured", "m.csv")
    assert (code, "neither ttft_ms nor tpot_ms" in err, "Traceback" in err) == (2, True, False)


def test_a_correction_serves_other_predictions(moeplan):
    assert moeplan("p.csv", "--measured", "m.csv")[0] == 0
    found = Calibration.read("calibration.json")
    Path("other.csv").write_text("isl,osl,concurrency,ttft_ms\n1,1,1,50\n")
    assert moeplan("other.csv", "--use", "calibration.json", "--corrected", "c.csv")[0] == 0
    (times,) = read_served("c.csv")
    assert (times.ttft_ms, times.tpot_ms) == (pytest.approx(found.ttft_ms(50), rel=1e-5), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("p.csv",), "give your own measurements with --measured"),
        (("p.csv", "--use", "other.json"), "--use goes with --corrected"),
        (("p.csv", "--use", "other.json", "--corrected", "c.csv"), "other.json: kind: expected 'moeplan.calibration'"),
        (("none.csv", "--measured", "m.csv"), "none.csv: no such file"),
        (("p.csv", "--measured", "none.csv"), "none.csv: no such file"),
        (("p.csv", "--measured", "bad.csv"), "columns isl, osl, concurrency and one or both of ttft_ms, tpot_ms"),
        (("p.csv", "--measured", "tiny.csv"), "tiny.csv, line 2: ttft_ms"),
        (("p.csv", "--measured", "other.csv"), "none of 1 measurements is of a load that is predicted"),
        (("other.json", "--measured", "m.csv"), "kind: expected 'moeplan.plan'"),
        (("p.csv", "--measured", "m.csv", "-o", "m.csv"), "m.csv: is read, and the output would replace it"),
        (("p.csv", "--measured", "m.csv", "--concurrency", "0"), "Input should be greater than or equal to 1"),
    ],
)
def test_bad_input_is_refused_in_words(moeplan, options, message):
    Path("bad.csv").write_text("a,b\n1,2\n")
    Path("other.csv").write_text("isl,osl,concurrency,tpot_ms\n5,5,5,5\n")
    Path("tiny.csv").write_text("isl,osl,concurrency,ttft_ms\n1024,1024,16,1e-320\n")
    Path("other.json").write_text("{}")
    code, out, err = moeplan(*options)
    assert code == 2
    assert message in err, err
    assert "Traceback" not in err
    assert not out
    assert not Path("calibration.json").exists()

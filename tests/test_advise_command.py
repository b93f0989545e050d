"""The command ``moeplan advise``: on tables of a folder and on a measured cluster, and bad input in words."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from moeplan.planner.advise.measured import kernel_table
from moeplan.service import cli
from moeplan.service.advising import tried
from moeplan.spec.advice import Advice
from moeplan.spec.catalogue import load_model
from moeplan.spec.errors import MoeplanError
from moeplan.spec.trace import Trace
from moeplan.tests.synthetic import cluster

ROOT = Path(__file__).parents[1]
MODEL = load_model("tiny-moe")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def moeplan(capfd: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copy(ROOT / "examples" / "tiny_moe" / "trace.npz", "t.npz")

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeplan", "advise", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capfd.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, captured.out, " ".join(captured.err.split())

    return run


USUAL = ("--model", "tiny-moe", "--trace", "t.npz", "--time-limit", "4")
GPU = (*USUAL, "--device", "h200_sxm", "--ep", "4", "--slots", "16", "--tokens", "256", "--prefill", "512")
QUICK = (*GPU, "--placement", "eplb")


def test_it_answers_for_both_phases_and_writes_it(moeplan):
    pytest.importorskip("aiconfigurator_core")
    code, out, _ = moeplan(*GPU, "--engine", "tensorrt-llm", "--step-ms", "5")
    assert code == 0
    found = Advice.read("advice.json")
    assert found.phases == ("prefill", "decode")
    assert {option.placement for option in found.options} == {"eplb", "moeplan"}
    assert "trtllm" in found.kernel
    assert "scaled by" in found.kernel  # no table has experts of 128 x 128
    for phase in found.phases:
        assert f"\n{phase}: " in out
    assert found.options[0].phases[1].step_gain is not None
    assert "wrote advice.json" in out


def test_json_is_the_document_alone_and_repeats(moeplan):
    pytest.importorskip("aiconfigurator_core")
    shown = []
    for _ in range(2):
        code, out, _ = moeplan(*QUICK, "--json", "--engine", "vllm")
        assert code == 0
        shown.append(json.loads(out))
    assert shown[0] == shown[1]
    written = json.loads(Path("advice.json").read_text())
    assert shown[0] == {k: v for k, v in written.items() if k not in ("kind", "version")}


def test_a_measured_cluster_takes_the_place_of_tables(moeplan):
    cluster(MODEL, ((1, 1), (1, 1)), dtype=MODEL.dtype).write("c.json")
    code, out, _ = moeplan(
        *USUAL,
        "--placement",
        "eplb",
        "--cluster",
        "c.json",
        "--slots",
        "16",
        "--tokens",
        "64",
        "--prefill",
        "256",
        "--replan-every",
        "1",
    )
    assert code == 0
    found = Advice.read("advice.json")
    assert found.devices == 4
    assert "measured cluster" in found.kernel
    assert found.link_bytes_per_second > 0
    assert "a re-plan takes" in out or "yes" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (USUAL, "give either --device, a GPU with measured tables, or --cluster"),
        ((*GPU, "--cluster", "c.json"), "give either --device"),
        ((*USUAL, "--device", "h200"), "GPU type 'h200': not known; .*h200_sxm"),
        ((*GPU, "--engine", "llama"), "moe of llama on h200_sxm: no such table"),
        ((*GPU, "--format", "fp3"), "has no rows of experts in fp3; pass one of these with --format: .*bfloat16"),
        (
            (*GPU, "--slots", "18"),
            "--slots 18: engines need as many on each of 4 devices and 16 in all, or more: use 20",
        ),
        ((*GPU, "--fit", "0:1"), "leaves nothing to judge"),
        ((*GPU, "--model", "mixtral"), "t.npz: has 8 layers x 16 experts, top-2; mixtral has 32 x 8"),
        ((*GPU, "--model", "gpt-5"), "gpt-5"),
        ((*GPU, "--trace", "none.npz"), "none.npz: no such file"),
        ((*GPU, "--trace", "counts.npz"), "the trace has counts only"),
        ((*GPU, "--step-ms", "0.001"), "shorter than its experts alone"),
        ((*GPU, "--tables", "nowhere"), "nowhere"),
        ((*GPU, "-o", "t.npz"), "t.npz: is read, and the output would replace it"),
        ((*USUAL, "--cluster", "c.json", "--ep", "8"), "--ep 8 does not go with --cluster: it has 4 devices"),
    ],
)
def test_bad_input_is_refused_in_words(moeplan, options, message):
    pytest.importorskip("aiconfigurator_core")
    cluster(MODEL, ((1, 1), (1, 1)), dtype=MODEL.dtype).write("c.json")
    Trace.of_counts(Trace.read("t.npz").expert_counts).write("counts.npz")
    code, out, err = moeplan(*options)
    assert code == 2
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert not out
    assert not Path("advice.json").exists()


def test_slots_that_are_tried():
    assert tried(None, 16, 4) == (16, 20, 24, 32)
    assert tried(None, 6, 4) == (8, 12, 16, 24)
    assert tried([32, 16, 32], 16, 4) == (16, 32)
    with pytest.raises(MoeplanError, match="use 16"):
        tried([8], 16, 4)


def rows(**shapes: tuple[int, int]) -> pd.DataFrame:
    """Even rows of named kernels, each of a (hidden, ffn)."""
    return pd.DataFrame(
        [
            {"routing": "balanced", "tp": 1, "ep": ep, "tokens": n, "seconds": 1e-5 * n * hidden, "dtype": "bfloat16"}
            | {"kernel": name, "hidden": hidden, "ffn": ffn, "experts": 16, "top_k": 2, "source": "e 1"}
            | {"origin": "measured"}
            for name, (hidden, ffn) in shapes.items()
            for ep in (1, 2, 4)
            for n in (1, 2, 4)
        ]
    )


def known(frame: pd.DataFrame) -> SimpleNamespace:
    return SimpleNamespace(table=lambda *asked: SimpleNamespace(frame=frame))


def test_the_very_shape_is_taken_and_else_the_nearest_scaled():
    exact = kernel_table(known(rows(a=(128, 128), b=(256, 64))), "gpu", "e", MODEL)  # type: ignore[arg-type]
    assert exact.ratio == 1
    assert exact.origin.startswith("e 1 on gpu, a, bfloat16")
    near = kernel_table(known(rows(a=(512, 128), b=(8192, 4096))), "gpu", "e", MODEL)  # type: ignore[arg-type]
    assert near.ratio == 0.25
    assert "scaled by 0.25 to 128 x 128" in near.origin
    read = near.seconds(np.array([2.0, 8.0]), np.array([2.0, 4.0]), 4)
    full = replace(near, ratio=1.0).seconds(np.array([2.0, 8.0]), np.array([2.0, 4.0]), 4)
    assert read - near.launch == pytest.approx(0.25 * (full - near.launch))

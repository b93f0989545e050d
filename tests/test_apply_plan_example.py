"""The example on two ranks, started by torchrun as a user does."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from moeplan.spec.plan import LayerPlan
from moeplan.tests.small_families import build, plan_for

EXAMPLE = Path(__file__).parents[1] / "examples" / "transformers_generate.py"
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
TORCHRUN += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
UNEVEN = LayerPlan(strategy="ep", slots=((5, 0, 3), (1, 2, 4, 6, 7, 3)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("qwen3_moe", vocab_size=256).save_pretrained(folder)
    plan_for(build("qwen3_moe"), lambda form: UNEVEN).write(folder / "plan.json")
    return folder


def started(*arguments: object, ranks: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(TORCHRUN if ranks else []), str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_texts_are_those_of_the_whole_model(folder: Path) -> None:
    ended = started(
        "--model", folder, "--plan", folder / "plan.json", "--tokens", 6, "--prompt", "Once", "upon", "a", "time"
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("as the whole model") == 4
    assert "NOT" not in ended.stdout


def test_a_plan_alone_is_refused(folder: Path) -> None:
    ended = started("--plan", folder / "plan.json", ranks=False)
    assert ended.returncode == 2
    assert "give --model and --plan, and start it by torchrun" in ended.stderr

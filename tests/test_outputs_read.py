"""An output that is also an input is refused before the work, whatever the path is spelled as."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from moeplan.service import cli
from moeplan.spec.catalogue import load_model
from moeplan.spec.claims import release
from moeplan.spec.plan import LayerPlan, RoutingSource
from moeplan.tests.exports import linear_placement
from moeplan.tests.hostile_seeds import CONFIG
from moeplan.tests.plans import even_slots, hand_made_plan
from moeplan.tests.routings import random_trace
from moeplan.tests.synthetic import cluster

QUICK = ["--steps", "50", "--time-limit", "2", "--devices", "2"]
CASES = [
    (["place", "--trace", "trace.npz", *QUICK, "-o", "OUT"], "trace.npz"),
    (["place", "--trace", "trace.npz", *QUICK, "-m", "model/config.json", "-o", "OUT"], "model/config.json"),
    (["place", "--trace", "trace.npz", "-m", "model", "--cluster", "cluster.json", "-o", "OUT"], "cluster.json"),
    (["solve", "-m", "model", "--cluster", "cluster.json", "-o", "OUT"], "cluster.json"),
    (["solve", "-m", "model", "-o", "OUT"], "model/config.json"),
    (["solve", "-m", "model", "--trace", "trace.npz", "-o", "OUT"], "trace.npz"),
    (["solve", "-m", "model", "--placement", "place.json", "-o", "OUT"], "place.json"),
    (["run", "--placement", "place.json", "-m", "model", "-o", "OUT"], "place.json"),
    (["run", "--placement", "place.json", "-m", "model", "-o", "OUT"], "cluster.json"),
    (["run", "plan.json", "-o", "OUT"], "plan.json"),
    (["run", "plan.json", "-o", "OUT"], "trace.npz"),  # named by the plan
    (["run", "plan.json", "--trace", "trace.npz", "-o", "OUT"], "trace.npz"),
    (["run", "plan.json", "--lab", "lab.yaml", "-o", "OUT"], "lab.yaml"),
    (["run", "plan.json", "--weights", "weights", "-o", "OUT"], "weights/model.safetensors"),
    (["run", "plan.json", "--weights", "weights", "-o", "OUT"], "weights/config.json"),
    (["profile", "-m", "model", "-o", "OUT"], "model/config.json"),
    (["export", "place.json", "--to", "vllm", "-m", "model/config.json", "-o", "OUT"], "place.json"),
    (["export", "place.json", "--to", "vllm", "-m", "model/config.json", "-o", "OUT"], "model/config.json"),
    (["trace", "import", "trace.npz", "-o", "OUT"], "trace.npz"),
    (["trace", "import", "answers", "-o", "OUT"], "answers/a.json"),
    (["trace", "import", "trace.npz", "-m", "model", "-o", "OUT"], "model/config.json"),
    (["trace", "capture", "-m", "model", "--random-weights", "--text", "text.txt", "-o", "OUT"], "text.txt"),
    (["trace", "capture", "-m", "model", "--random-weights", "--text", "text.txt", "-o", "OUT"], "model/config.json"),
    (["trace", "stats", "trace.png", "--picture", "OUT"], "trace.png"),
    (["explain", "place.png", "--trace", "trace.npz", "--picture", "OUT"], "place.png"),
]  # fmt: skip


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One valid file of every kind, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps(CONFIG))
    model = load_model("model")
    trace = random_trace(0, 3, 4, 60, 2)
    trace.write("trace.npz")
    cluster(model, ((1.0, 0.5),)).write("cluster.json")
    routing = RoutingSource(kind="trace", path="trace.npz", digest=trace.digest())
    layer = LayerPlan(strategy="ep", slots=even_slots(4, 2))
    hand_made_plan(model, "decode:4@8", [layer], tokens=[2, 2], routing=routing).write("plan.json")
    linear_placement(model, 2).write("place.json")
    Path("lab.yaml").write_text("name: two\nhosts:\n  - {name: a, ranks: 1, cpu_share: 0.5}\nuplink_gbit: 1.0\n")
    Path("text.txt").write_text("texts " * 5000)
    Path("weights").mkdir()
    shutil.copy("model/config.json", "weights")
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    Path("weights/model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    Path("answers").mkdir()
    Path("answers/a.json").write_text(
        json.dumps({"prompt_routed_experts": [[[0, 1]] * 3] * 2, "outputs": [{"routed_experts": [[[0, 1]] * 3]}]})
    )
    shutil.copy("trace.npz", "trace.png")
    shutil.copy("place.json", "place.png")
    return tmp_path


def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, argv: list[str]) -> tuple[int, str]:
    """Exit code and standard error of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["moeplan", *argv])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, capfd.readouterr().err


def _other_name(name: str, how: str) -> str:
    """Another path of the same file."""
    if how == "spelling":
        return f"./model/..//{name}"
    other = f"other{Path(name).suffix}"
    if how == "symlink":
        os.symlink(name, other)
    elif how == "hardlink":
        os.link(name, other)
    return name if how == "same" else other


@pytest.mark.parametrize(("argv", "name"), CASES, ids=[f"{' '.join(a[:2])}: {n}" for a, n in CASES])
@pytest.mark.parametrize("how", ["same", "spelling", "symlink", "hardlink"])
def test_an_input_is_no_output(
    argv: list[str], name: str, how: str, files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    before = Path(name).read_bytes()
    output = _other_name(name, how)
    if how == "same" and argv[0] == "export":
        output = f"./{output}"
    code, err = command(monkeypatch, capfd, [output if word == "OUT" else word for word in argv])
    assert code == 2
    assert err.count("\n") == 1
    assert "is read, and the output" in err
    assert Path(name).read_bytes() == before


def test_a_profile_is_added_to_and_a_previous_placement_replaced(
    files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    argv = ["place", "--trace", "trace.npz", *QUICK]
    assert command(monkeypatch, capfd, [*argv, "-o", "place.json"])[0] == 0
    before = Path("place.json").read_bytes()
    code, _ = command(monkeypatch, capfd, [*argv, "--previous", "place.json", "--max-moves", "1", "-o", "place.json"])
    assert code == 0
    assert json.loads(Path("place.json").read_text())["moves"]["previous"] == "place.json"
    assert Path("place.json").read_bytes() != before
    # What a profile finds in its own output is read, and what does not fit it refused, before anything is measured.
    Path("broken.json").write_text("{}")
    code, err = command(monkeypatch, capfd, ["profile", "-m", "model", "-o", "broken.json"])
    assert code == 2
    assert "broken.json: kind: expected 'moeplan.cluster'" in err


def test_the_next_command_may_read_what_the_last_one_wrote(
    files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    assert command(monkeypatch, capfd, ["place", "--trace", "trace.npz", *QUICK, "-o", "plan.json"])[0] == 0
    assert command(monkeypatch, capfd, ["run", "plan.json", "-o", "plan.json"])[0] == 2
    assert command(monkeypatch, capfd, ["compare", "plan.json", "place.json"])[0] == 0
    release()

"""What commands say about models that they cannot take: true, in one line, and of what the user typed."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from moeplan.benchmarks.families import SMALL
from moeplan.planner.place.explain import expert_bytes
from moeplan.runtime.weights import check_supported
from moeplan.service.cli import main
from moeplan.service.pages.plan import memory_table
from moeplan.spec import Cluster, Placement, Plan
from moeplan.spec.catalogue import catalogue, load_model
from moeplan.spec.errors import MoeplanError
from moeplan.spec.executed import not_executed
from moeplan.spec.model import Model
from moeplan.spec.operators import attention_shape
from moeplan.tests.routings import random_trace
from moeplan.tests.synthetic import cluster

REFUSED = ["longcat-flash", "switch-base-8", "gpt-moe-8", "swin-moe-small"]
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}


def moeplan(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["moeplan", *arguments])
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as end:
        main()
    out, err = capfd.readouterr()
    return int(end.value.code or 0), out, err


def folder(path: Path, family: str, **changes: Any) -> Path:
    """A small configuration of a family as a folder that Transformers would load."""
    config = transformers.AutoConfig.for_model(family, **(SMALL[family][1] | changes))
    body = json.loads(config.to_json_string()) | {"dtype": "float32"}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(body))
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the profile of another model."""
    monkeypatch.chdir(tmp_path)
    cluster(load_model("tiny-moe"), ((1.0, 1.0),)).write("cluster.json")
    return tmp_path


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("command", ["profile", "solve"])
def test_no_command_sends_to_another_that_refuses(
    command: str, name: str, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = moeplan(monkeypatch, capfd, command, "--model", name)
    assert code == 2
    assert "the runtime does not execute" in err
    assert "measure it with" not in err
    assert "moeplan place" in err
    assert err.startswith(f"error: {name}: layer 0: ")
    assert err.count("\n") == 1


def test_what_the_message_says_works_does(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """place, explain and compare of gpt-oss; its steps are predicted once Transformers' layers are measured."""
    random_trace(0, 24, 32, tokens=60, top_k=4).write("t.npz")
    place = ("place", "--trace", "t.npz", "--model", "gpt-oss-20b")
    limits = ("--equal-slots", "--objective", "balance", "--time-limit", "1", "--steps", "10")
    assert moeplan(monkeypatch, capfd, *place, "--devices", "4", *limits, "-o", "a.json")[0] == 0
    assert moeplan(monkeypatch, capfd, "compare", "a.json", "a.json")[0] == 0
    code, out, _ = moeplan(monkeypatch, capfd, "explain", "a.json", "--trace", "t.npz", "--json")
    assert code == 0
    assert json.loads(out)["explanation"]["one_more_slot"]["bytes_per_device"] == 24 * 13_236_480
    code, _, err = moeplan(monkeypatch, capfd, *place, "--cluster", "cluster.json")
    assert code == 2
    assert "measure it with `moeplan profile --model gpt-oss-20b --dtype bf16`" in err


@pytest.mark.parametrize("command", ["solve", "place"])
def test_advice_names_the_path_that_was_typed(
    command: str, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The folder has the name of a catalogue model; following the advice must not measure that one."""
    own = folder(here / "olmoe", "olmoe")
    random_trace(0, 4, 6, top_k=3).write("t.npz")
    arguments = {"solve": ("solve",), "place": ("place", "--trace", "t.npz", "--cluster", "cluster.json")}[command]
    for typed in ("./olmoe", "./olmoe/config.json", str(own)):
        code, _, err = moeplan(monkeypatch, capfd, *arguments, "--model", typed)
        assert code == 2
        assert f"moeplan profile --model {typed} --dtype f32" in err
    code, _, err = moeplan(monkeypatch, capfd, *arguments[:1], *arguments[1:], "--model", "olmoe")
    assert "./olmoe" not in err


def test_a_path_with_a_space_can_be_copied(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder(here / "my model", "olmoe")
    _, _, err = moeplan(monkeypatch, capfd, "solve", "--model", "./my model")
    assert "--model './my model' --dtype" in err


def test_a_refused_path_is_named_as_typed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder(here / "mixtral", "longcat_flash")
    for command in ("solve", "profile"):
        code, _, err = moeplan(monkeypatch, capfd, command, "--model", "./mixtral")
        assert code == 2
        assert err.startswith("error: ./mixtral: layer 0: the runtime does not execute mla attention")


def test_sizes_are_those_of_the_model_that_was_placed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A folder called as a catalogue model of the same shape: explain must not look that one up."""
    folder(here / "tiny-moe", "mixtral", num_hidden_layers=8, num_local_experts=16)
    random_trace(0, 8, 16).write("t.npz")
    code, *_ = moeplan(
        monkeypatch, capfd, "place", "--trace", "t.npz", "-m", "./tiny-moe", "--steps", "100", "-o", "p.json"
    )
    assert code == 0
    placed = Placement.read("p.json")
    assert placed.model == "tiny-moe"
    assert placed.expert_bytes == (load_model("./tiny-moe").expert_bytes(),) * 8
    assert placed.expert_bytes[0] != load_model("tiny-moe").expert_bytes()
    assert expert_bytes(placed) == (list(placed.expert_bytes), "")


def test_one_list_of_what_runs() -> None:
    """Planner and runtime agree; what runs is not refused, what is refused says what."""
    for model in catalogue().values():
        missing = not_executed(model)
        if not missing:
            check_supported(model)
            continue
        with pytest.raises(MoeplanError, match=f"{model.name}: {missing}"):
            check_supported(model)
    assert not any(not_executed(load_model(name)) for name in ("mixtral", "olmoe", "qwen3-30b-a3b-fp8", "lab-moe"))


def test_layers_with_and_without_a_window_are_timed_apart(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = folder(here / "m", "qwen2_moe", use_sliding_window=True, sliding_window=8, max_window_layers=3)
    model = load_model(str(path))
    shapes = [attention_shape(block) for block in model.layers]
    assert [shape.get("window") for shape in shapes] == [8, None, 8, None]
    plain = Model.model_validate(model.model_dump() | {"blocks": list(full_attention(model))})
    cluster(plain, ((1.0, 1.0),)).write("plain.json")  # a profile that knows no window
    code, _, err = moeplan(monkeypatch, capfd, "solve", "-m", "./m", "--cluster", "plain.json")
    assert code == 2
    assert "window 8" in err
    cluster(model, ((1.0, 1.0),)).write("both.json")
    curves = {e.shape.get("window") for e in Cluster.read("both.json").kinds[0].operators if "attention" in e.operator}
    assert curves == {8, None}
    assert moeplan(monkeypatch, capfd, "solve", "-m", "./m", "--cluster", "both.json", "-o", "p.json")[0] == 0


def full_attention(model: Model) -> Any:
    for block in model.layers:
        assert block.attention is not None
        yield block.model_copy(update={"attention": block.attention.model_copy(update={"sliding_window": None})})


# Which bytes are meant


def test_a_plan_counts_what_the_runtime_holds_and_says_so(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plans = {}
    for name, scheme in (("plain", {}), ("fp8", {"quantization_config": FP8})):
        folder(here / name, "mixtral", **scheme)
        cluster(load_model(f"./{name}"), ((1.0, 1.0),)).write("own.json")
        code, out, err = moeplan(
            monkeypatch, capfd, "solve", "-m", f"./{name}", "--cluster", "own.json", "-o", "p.json"
        )
        assert code == 0
        assert ("dequantised" in err) == (name == "fp8")
        assert ("weights dequantised to f32" in out) == (name == "fp8")
        plans[name] = Plan.read("p.json")
    assert plans["plain"].predicted == plans["fp8"].predicted
    assert plans["plain"].layers == plans["fp8"].layers
    assert memory_table(plans["fp8"]).title == "memory per device, weights dequantised to f32"


def test_place_counts_what_engines_hold(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where bfloat16 does not fit a device, fp8 does; moves are counted in the same bytes."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 32}
    random_trace(0, 3, 6).write("t.npz")
    for name, scheme in (("plain", {}), ("fp8", {"quantization_config": FP8})):
        folder(here / name, "mixtral", **sizes, **scheme)
    plain, fp8 = load_model("./plain"), load_model("./fp8")
    assert fp8.expert_bytes() == 3 * 128 * 256 + 4 * 3 * (128 // 32) * (256 // 32)
    memory = (plain.rest_bytes() + 3 * 2.5 * plain.expert_bytes()) / 0.9  # two and a half experts of each layer
    cluster(plain, ((1.0, 1.0),), memory=memory).write("small.json")
    place = ("place", "--trace", "t.npz", "--cluster", "small.json", "--steps", "100")
    code, _, err = moeplan(monkeypatch, capfd, *place, "-m", "./plain")
    assert code == 2
    assert "holds [2, 2] experts of every layer" in err
    code, *_ = moeplan(monkeypatch, capfd, *place, "-m", "./fp8", "-o", "a.json")
    assert code == 0
    code, out, _ = moeplan(monkeypatch, capfd, *place, "-m", "./fp8", "--previous", "a.json", "--seed", "5", "--json")
    moves = json.loads(out)["moves"]
    assert code == 0
    assert moves["bytes"] == moves["copies"] * fp8.expert_bytes()


def test_models_shows_what_is_read_from_a_path(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder(here / "m", "qwen3_moe", quantization_config=FP8)
    code, out, _ = moeplan(monkeypatch, capfd, "models", "--json", "./m", "gpt-oss-20b")
    rows = json.loads(out)
    assert code == 0
    assert [row["name"] for row in rows] == ["m", "gpt-oss-20b"]
    assert [row["expert_format"] for row in rows] == ["fp8", "mxfp4"]
    assert rows[0]["expert_bytes"] == load_model("./m").expert_bytes()
    assert rows[1]["not_executed"] == "layer 0: the runtime does not execute attention sinks"
    code, _, err = moeplan(monkeypatch, capfd, "models", "./nothing")
    assert code == 2
    assert "./nothing" in err


def test_predicted_time_needs_tokens(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trace = random_trace(0, 8, 16)
    type(trace).of_counts(trace.expert_counts).write("counts.npz")
    arguments = ("place", "--trace", "counts.npz", "-m", "tiny-moe", "--cluster", "cluster.json")
    code, _, err = moeplan(monkeypatch, capfd, *arguments)
    assert code == 2
    assert "counts only: leave out --cluster" in err

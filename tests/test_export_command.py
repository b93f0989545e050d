"""``moeplan export``: files, launch flags, notes, checks of existing files, and bad input in one line."""

import json
import shlex
from pathlib import Path

import pytest
import typer

from moeplan.planner.export import ENGINES, read_back
from moeplan.service.commands import export as command
from moeplan.spec.catalogue import load_model
from moeplan.spec.errors import MoeplanError
from moeplan.tests.exports import linear_placement, placement_of, random_placement, small_model

app = typer.Typer()
app.command(name="export")(command.export)
app.callback()(lambda: None)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """place.json of model.json (8 layers, 16 experts) on 4 devices with 5 slots each."""
    monkeypatch.chdir(tmp_path)
    small_model(16, 8, dense=0).write(tmp_path / "model.json")
    return random_placement(0, 16, 4, 5, layers=8).write(tmp_path / "place.json")


def moeplan(*args: object) -> None:
    app(["export", *map(str, args)], standalone_mode=False)


def test_every_engine_writes_its_files_and_checks_them(place: Path, capfd: pytest.CaptureFixture) -> None:
    linear = linear_placement(load_model("model.json"), 4).write("linear.json")
    for engine in ENGINES:
        source = linear if engine == "megatron" else place
        moeplan(source, "--to", engine, "--model", "model.json", "-o", Path("out") / engine, "--json")
        body = json.loads(capfd.readouterr().out)
        assert body["engine"] == engine
        assert body["version"] == ENGINES[engine].version
        assert {path.name for path in (Path("out") / engine).iterdir()} == {Path(p).name for p in body["files"]}
        assert any(str(Path("out") / engine) in argument for argument in body["command"]) or engine in (
            "vllm",
            "megatron",
        )
        assert body["notes"]
        for path in body["files"]:
            moeplan("--check", path, "--to", engine, "-m", "model.json", "--devices", 4)
            assert "valid" in capfd.readouterr().out


def test_one_file_under_the_name_that_was_asked_for(place: Path, capfd: pytest.CaptureFixture) -> None:
    moeplan(place, "--to", "sglang", "-m", "model.json", "-o", "here/location.json")
    out, err = capfd.readouterr()
    flags = shlex.split(out.splitlines()[-1])
    assert flags[flags.index("--init-expert-location") + 1] == "here/location.json"
    assert flags[flags.index("--ep-num-redundant-experts") + 1] == "4"
    assert "note:" in err
    assert len(read_back("sglang", Path("here/location.json").read_text(), 4, load_model("model.json"))) == 8
    assert [path.name for path in Path("here").iterdir()] == ["location.json"]
    moeplan(place, "--check", "here/location.json", "--to", "sglang", "-m", "model.json", "--json")
    assert json.loads(capfd.readouterr().out)["valid"] is True


def test_one_file_of_several_is_named_as_the_engine_names_it(place: Path, capfd: pytest.CaptureFixture) -> None:
    linear_placement(load_model("model.json"), 4).write("linear.json")
    moeplan("linear.json", "--to", "megatron", "-m", "model.json", "-o", "mine.json")
    err = " ".join(capfd.readouterr().err.split())
    assert "mine.json is Megatron-Core's expert-permutation.json; --output FOLDER writes" in err
    assert "apply mine.json" in err
    moeplan("linear.json", "--to", "megatron", "-m", "model.json", "-o", "folder")
    assert "--output FOLDER" not in capfd.readouterr().err


def test_bad_input_is_one_line_and_writes_nothing(place: Path) -> None:
    placement_of([[list(range(9)), list(range(9, 16))]] * 8, 16).write("uneven.json")
    random_placement(1, 16, 4, 5, layers=8).write("other.json")
    moeplan(place, "--to", "sglang", "-m", "model.json", "-o", "location.json")
    Path("cut.json").write_text(Path("location.json").read_text()[:100])
    model = ("-m", "model.json")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((place, "--to", "sglan", *model), "nearest: sglang"),
        ((place, "--to", "sglang", "-m", "olmoe"), "8 mixture-of-experts layers, model 'olmoe' has 16"),
        ((place, "--to", "megatron", *model), "20 slots for 16 experts"),
        ((place, "--to", "sglang", *model, "-o", "location.pt"), r"location.pt: the engine reads .json files only"),
        ((place, "--to", "tensorrt-llm", *model, "-o", "x.json"), r"x.json: the engine reads .yaml files only"),
        ((place, "--to", "vllm", *model, "-o", "x.pt"), r"x.pt: the engine reads .txt, .jsonl, .json files only"),
        (("uneven.json", "--to", "sglang", *model), "--equal-slots"),
        (("none.json", "--to", "sglang", *model), "none.json: no such file; make one with `moeplan place`"),
        (("--to", "sglang", *model), "name the placement"),
        (("--to", "sglang", *model, "--check", "location.json"), "--devices"),
        (("--to", "sglang", *model, "--check", "location.json", "--devices", 3), "do not divide between 3 ranks"),
        (("--to", "sglang", *model, "--check", "none.json", "--devices", 4), "none.json: no such file"),
        (("--to", "sglang", *model, "--check", "cut.json", "--devices", 4), "cut.json: "),
        ((place, "--to", "sglang", *model, "--check", "location.json", "--devices", 8), "the placement has 4"),
        (("other.json", "--to", "sglang", *model, "--check", "location.json"), "another placement"),
    ]
    before = {path: path.read_bytes() for path in Path().iterdir()}
    for arguments, problem in cases:
        with pytest.raises(MoeplanError, match=problem) as refused:
            moeplan(*arguments)
        assert "\n" not in str(refused.value)
        assert {path: path.read_bytes() for path in Path().iterdir()} == before, arguments

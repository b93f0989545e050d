"""`moeplan models --template`: what it writes validates, says what it means, and is a model for the other commands."""

import json
from pathlib import Path

import pytest

from moeplan.service import cli
from moeplan.spec import Model
from moeplan.spec.catalogue.template import EXPLAINED, template

ROOT = Path(__file__).parents[1]


def moeplan(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, *args: object) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["moeplan", *map(str, args)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0, *capfd.readouterr()


def paths(body: dict, inside: str = "") -> set[str]:
    found = set()
    for key, value in body.items():
        found.add(inside + key)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                found |= paths(part, f"{inside}{key}.")
    return found


def test_the_template_validates_and_every_field_is_explained(tmp_path: Path, monkeypatch, capfd) -> None:
    path = tmp_path / "model.json"
    code, out, err = moeplan(monkeypatch, capfd, "models", "--template", path)
    assert (code, err) == (0, "")
    model = Model.read(path)
    assert model == template()
    assert paths(json.loads(path.read_text())) == set(EXPLAINED)
    for field, meaning in EXPLAINED.items():
        assert field in out
        assert meaning.split(",")[0][:40] in " ".join(out.split()), field
    # An arithmetic of its own: DeepSeek-V2-Lite's experts, plain attention.
    experts = 27 * 64 * 3 * 2048 * 1408
    rest = 28 * (4 * 2048**2 + 2 * 2048) + 27 * (2048 * 64 + 3 * 2048 * 2816) + 3 * 2048 * 10944
    assert model.total_parameters() == experts + rest + 2 * 102400 * 2048 + 2048
    assert model.cache_values() == 28 * 2 * 2048


def test_other_commands_take_it(tmp_path: Path, monkeypatch, capfd) -> None:
    path, placed = tmp_path / "model.json", tmp_path / "place.json"
    assert moeplan(monkeypatch, capfd, "models", "--template", path)[0] == 0
    # Of the example's recorded routing: 8 layers of 16 experts, two for a token.
    body = json.loads(path.read_text())
    body["blocks"][1]["count"] = 8
    body["blocks"][1]["moe"] |= {"num_experts": 16, "top_k": 2}
    path.write_text(json.dumps(body))
    assert moeplan(monkeypatch, capfd, "models", path)[0] == 0
    trace = ROOT / "examples/tiny_moe/trace.npz"
    argv = ["place", "--trace", trace, "--devices", 4, "--model", path, "--steps", 1000, "-o", placed]
    assert moeplan(monkeypatch, capfd, *argv)[0] == 0
    assert json.loads(placed.read_text())["expert_bytes"] == [2 * 3 * 2048 * 1408] * 8
    code, _, err = moeplan(monkeypatch, capfd, "profile", "--model", path, "-o", tmp_path / "cluster.json")
    assert code == 2
    assert "my_model" in err


def test_what_was_filled_in_is_not_overwritten(tmp_path: Path, monkeypatch, capfd) -> None:
    path = tmp_path / "model.json"
    path.write_text("mine")
    code, _, err = moeplan(monkeypatch, capfd, "models", "--template", path)
    assert code == 2
    assert "exists already" in err
    assert path.read_text() == "mine"
    for more in (["mixtral"], ["--json"]):
        code, _, err = moeplan(monkeypatch, capfd, "models", "--template", tmp_path / "other.json", *more)
        assert code == 2
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "other.json").exists()

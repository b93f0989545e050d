"""The table engine x model family: `export` refuses, notes or writes by it, and the docs print it."""

import re
from pathlib import Path

import pytest
import typer

from moeplan.planner.export import ENGINES
from moeplan.planner.export.families import TABLE, UNKNOWN, cell_of, notes_of
from moeplan.planner.export.tables import in_document
from moeplan.service.commands import export as command
from moeplan.spec.catalogue import catalogue, load_model
from moeplan.spec.catalogue.huggingface import READERS
from moeplan.spec.errors import MoeplanError
from moeplan.tests.exports import linear_placement, small_model

app = typer.Typer()
app.command(name="export")(command.export)
app.callback()(lambda: None)
DOCUMENT = Path(__file__).parents[1] / "docs" / "engines.md"
ISSUE = {  # family -> a catalogue model
    "mixtral": "mixtral",
    "olmoe": "olmoe",
    "gpt_oss": "gpt-oss-20b",
    "longcat_flash": "longcat-flash",
    "deepseek_v2": "deepseek-v2-lite",
    "deepseek_v3": "deepseek-v3",
    "qwen3_moe": "qwen3-30b-a3b",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def moeplan(engine: str, model: str, devices: int = 8) -> list[Path]:
    """The files that the command writes for a linear placement of a catalogue model."""
    linear_placement(load_model(model), devices).write("place.json")
    app(["export", "place.json", "--to", engine, "-m", model, "-o", "out"], standalone_mode=False)
    return list(Path("out").iterdir())


@pytest.mark.parametrize(
    ("engine", "model", "reason"),
    [
        ("sglang", "gpt-oss-20b", "loaders put the experts in order.*wrong experts"),
        ("sglang", "gpt-oss-120b", "wrong experts"),
        ("sglang", "longcat-flash", "zero experts"),
        ("sglang", "mixtral", "MixtralForCausalLM has no get_model_config_for_expert_location.*first request"),
        ("sglang", "mixtral-8x22b", "first request"),
        ("sglang", "olmoe", "OlmoeForCausalLM has no"),
        ("tensorrt-llm", "gpt-oss-20b", "DeepSeek-V3, Mixtral, Llama-4, Qwen2-MoE and Qwen3-MoE.*silently ignores"),
        ("tensorrt-llm", "olmoe", "silently ignores"),
        ("tensorrt-llm", "longcat-flash", "silently ignores"),
        ("tensorrt-llm", "deepseek-v2-lite", "silently ignores"),
        ("vllm-ascend", "gpt-oss-20b", "wrong experts"),
        ("deepspeed", "gpt-oss-20b", "biases"),
        ("deepspeed", "longcat-flash", "no preset"),
        ("deepspeed", "gpt-moe-8", "not known to work"),
    ],
)
def test_what_an_engine_cannot_use_is_refused_with_version_and_reason(
    here: Path, engine: str, model: str, reason: str
) -> None:
    with pytest.raises(MoeplanError, match=reason) as refused:
        moeplan(engine, model)
    assert "\n" not in str(refused.value)
    assert ENGINES[engine].title in str(refused.value)
    assert not (here / "out").exists()


@pytest.mark.parametrize("model", ["gpt-oss-20b", "olmoe", "longcat-flash"])
def test_vllms_balancer_is_not_started_where_it_does_nothing(
    here: Path, model: str, capfd: pytest.CaptureFixture
) -> None:
    moeplan("vllm", model)
    assert "balancer does nothing" in capfd.readouterr().err
    swapped = linear_placement(load_model(model), 8)
    first, second, *rest = swapped.layers[0].slots
    layer = swapped.layers[0].model_copy(update={"slots": (second, first, *rest)})
    swapped.model_copy(update={"layers": (layer, *swapped.layers[1:])}).write("swapped.json")
    app(["export", "swapped.json", "--to", "vllm", "-m", model, "-o", "lost"], standalone_mode=False)
    assert "--enable-eplb" not in Path("lost/vllm-flags.txt").read_text()
    assert "the whole placement" in capfd.readouterr().err


@pytest.mark.parametrize("engine", ["sglang", "tensorrt-llm", "vllm", "vllm-ascend", "megatron"])
def test_unknown_families_are_written_and_said_not_to_be_known(
    here: Path, engine: str, capfd: pytest.CaptureFixture
) -> None:
    small_model(8, 2, family="my_own_moe").write("model.json")
    linear_placement(load_model("model.json"), 4).write("place.json")
    app(["export", "place.json", "--to", engine, "-m", "model.json", "-o", "out"], standalone_mode=False)
    said = capfd.readouterr().err
    assert re.search("not known to work.*'my_own_moe'", said)
    assert ENGINES[engine].version in said


def test_every_family_that_reaches_export_is_told_something() -> None:
    """Decoders of the catalogue and of every reader: written with or without a note, refused, or not known to work."""
    assert set(TABLE) == set(ENGINES)
    families = {m.family: m for m in catalogue().values() if m.causal}
    assert set(READERS) - set(families) <= {"qwen2_moe", "switch_transformers"} | {
        f for f in READERS if all(f not in cells for cells in TABLE.values())
    }
    for engine, cells in TABLE.items():
        for family, cell in cells.items():
            assert cell.source, (engine, family)
            assert bool(cell.why) == (cell.use in ("note", "refuse")), (engine, family)
        for model in families.values():
            cell = cell_of(engine, model)
            if cell.use == "refuse":
                with pytest.raises(MoeplanError, match=re.escape(ENGINES[engine].version)):
                    notes_of(ENGINES[engine], model)
            else:
                assert bool(notes_of(ENGINES[engine], model)) == (cell.use in ("note", "unknown"))
    assert all(family in TABLE["sglang"] for family in ISSUE)
    assert cell_of("sglang", load_model("gpt-moe-8")) is UNKNOWN


def test_the_document_prints_the_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert in_document(text) == text, "python -m moeplan.planner.export.tables docs/engines.md"
    for engine in ENGINES.values():
        assert f"| `{engine.name}` | {engine.title} {engine.version} |" in text

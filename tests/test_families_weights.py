"""Checkpoints of families that only Transformers computes, run on two ranks beside what ``from_pretrained`` gives."""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from moeplan import MoeplanError  # noqa: E402
from moeplan.profiler.families import read_family  # noqa: E402
from moeplan.runtime.coherent import executor_of  # noqa: E402
from moeplan.runtime.families.checkpoint import FamilyCheckpoint  # noqa: E402
from moeplan.runtime.families.weights_check import check_family_weights  # noqa: E402
from moeplan.runtime.launch import LocalLauncher, Rank  # noqa: E402
from moeplan.runtime.run import run  # noqa: E402
from moeplan.runtime.worker import step_inputs, weight_source  # noqa: E402
from moeplan.spec import Model  # noqa: E402
from moeplan.tests.small_families import build  # noqa: E402
from moeplan.tests.test_families_run import plan_of  # noqa: E402
from moeplan.tests.test_run import local  # noqa: E402

CPU = torch.device("cpu")
# Each expert by itself in the file; interleaved with biases; other names of layers; scaled before its experts; tied.
SAVED = ("glm4_moe", "gpt_oss", "nemotron_h", "llama4_text", "lfm2_moe")
TOLERANCE = 1e-4


def saved(family: str, folder: Path) -> Model:
    """A checkpoint with random weights, as Transformers writes it."""
    net = build(family).float()
    net.save_pretrained(folder)
    body = json.loads((folder / "config.json").read_text())
    return read_family(body, str(folder), family, "")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Model]]:
    found = {}
    for family in SAVED:
        folder = tmp_path_factory.mktemp(family)
        found[family] = folder, saved(family, folder)
    return found


def on_rank(rank: Rank, job: dict[str, Any]) -> dict[str, float]:
    """Largest error of the last tokens' logits that this rank computes, beside the model that ``from_pretrained``
    gives, with the model's own routing: experts divided, then columns."""
    found = {}
    for family, (folder, text) in job.items():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for kind in range(2):
            plan = plan_of(Model.model_validate(text), "prefill:24@8", (16, 8), kind)
            executor = executor_of(
                plan, rank.rank, weight_source(plan, plan.model, folder, CPU), device=CPU, capacity=0
            )
            executor.cache.fill(0, plan.seed)
            own = step_inputs(plan)[executor.layout.own]
            got = executor.step(own, executor.layout, 0).logits
            with torch.no_grad():
                wanted = theirs(own.view(-1, plan.workload.length)).logits[:, -1]
            found[f"{family} {kind}"] = ((got - wanted).abs().max() / wanted.abs().max()).item()
        rank.emit({"what": family})
    return found


@pytest.mark.timeout(600)
def test_logits_are_those_of_from_pretrained(folders) -> None:
    job = {name: (str(folder), model.model_dump(mode="json")) for name, (folder, model) in folders.items()}
    for found in LocalLauncher(2).run("moeplan.tests.test_families_weights:on_rank", job, timeout=300):
        assert len(found) == 2 * len(SAVED)
        assert {case: error for case, error in found.items() if not error <= TOLERANCE} == {}


def test_run_checks_output_and_weights(folders) -> None:
    folder, model = folders["glm4_moe"]
    launcher = LocalLauncher(2)
    report = run(
        plan_of(model, "prefill:24@8", (16, 8), 0, **local(launcher)),
        launcher,
        weights_folder=folder,
        repetitions=1,
        tolerance=1e9,
    )
    assert report.passed
    assert report.check is not None
    assert report.check.passed
    assert report.weights is not None
    assert report.weights.stored == "f32"
    assert report.weights.values > 100
    assert report.weights.layers == len(model.layers)
    assert report.weights.relative_error < TOLERANCE


def test_a_wrong_value_is_seen(folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = folders["gpt_oss"]
    read = FamilyCheckpoint.load

    def spoilt(self: FamilyCheckpoint, keys: Any) -> dict[str, torch.Tensor]:
        return {name: tensor + 1e-3 for name, tensor in read(self, keys).items()}

    monkeypatch.setattr(FamilyCheckpoint, "load", spoilt)
    found = check_family_weights(model, folder, 0)
    assert found["differing"] == found["values"] > 0
    assert not found["passed"]


def changed(folder: Path, target: Path, change: Any) -> Path:
    """The checkpoint with other tensors; change: of all of them, in place."""
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = safetensors.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, target / "model.safetensors")
    return target


def test_what_a_checkpoint_lacks_is_named(folders, tmp_path: Path) -> None:
    folder, model = folders["glm4_moe"]
    name = "model.layers.1.self_attn.q_proj.weight"
    without = changed(folder, tmp_path / "a", lambda tensors: tensors.pop(name))
    with pytest.raises(MoeplanError, match=f"no tensor for {name}"):
        FamilyCheckpoint(model, model, without, torch.float32, CPU).check()
    one = next(key for key in safetensors.load_file(folder / "model.safetensors") if ".experts.3.up_proj" in key)
    fewer = changed(folder, tmp_path / "b", lambda tensors: tensors.pop(one))
    with pytest.raises(MoeplanError, match=r"7 and 8 tensors for model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        FamilyCheckpoint(model, model, fewer, torch.float32, CPU).check()


def test_a_tensor_of_another_shape_is_named(folders, tmp_path: Path) -> None:
    folder, model = folders["gpt_oss"]
    name = "model.layers.1.self_attn.q_proj.weight"

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:, :-1].contiguous()

    source = FamilyCheckpoint(model, model, changed(folder, tmp_path / "a", narrow), torch.float32, CPU)
    with pytest.raises(MoeplanError, match=f"{name}: expected "):
        source.check()


def test_quantised_checkpoints_are_refused(folders, tmp_path: Path) -> None:
    folder, model = folders["glm4_moe"]
    copied = changed(folder, tmp_path / "a", lambda tensors: None)
    body = json.loads((copied / "config.json").read_text())
    body["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (copied / "config.json").write_text(json.dumps(body))
    with pytest.raises(MoeplanError, match="quantised, which is not read"):
        FamilyCheckpoint(model, model, copied, torch.float32, CPU)

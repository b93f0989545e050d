"""Families that are read through Transformers, beside what its modules say when they are counted by name."""

import json
import re
import warnings
from pathlib import Path

import pytest

from moeplan.benchmarks.synthetic_clusters import synthetic_cluster
from moeplan.profiler.families import read_family
from moeplan.service import cli
from moeplan.spec import Model, MoeplanError
from moeplan.spec.catalogue import load_model
from moeplan.spec.catalogue.huggingface import READERS
from moeplan.spec.executed import not_executed

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

EXPERTS = re.compile(r"layers\.(\d+)\..*experts\.(gate_up_proj|up_proj|down_proj)(_bias)?$")
LAYERS = 6
# Transformers 5.23 builds these, and keeps their experts elsewhere than in one module of a layer each.
ELSEWHERE = {"jetmoe", "longcat_flash", "nllb-moe", "switch_transformers"}


def moeplan(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, *args: object) -> tuple[int, str]:
    """Exit code, and what it wrote to standard error."""
    monkeypatch.setattr("sys.argv", ["moeplan", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0, capfd.readouterr().err


def families() -> list[str]:
    """Of causal language models whose source speaks of a number of experts, and that their defaults build."""
    root, found = Path(transformers.__file__).parent / "models", []
    for family, name in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        folder = transformers.models.auto.configuration_auto.model_type_to_module_name(family)
        sources = [path.read_text() for path in (root / folder).glob("modeling_*.py")]
        if any("use_experts_implementation" in text for text in sources) and isinstance(name, str):
            found.append(family)
    return sorted(set(found))


def built(body: dict) -> "torch.nn.Module | None":
    """Without memory; None where Transformers does not build it from its defaults."""
    fields = {key: value for key, value in body.items() if key != "model_type"}
    try:
        config = transformers.AutoConfig.for_model(body["model_type"], **fields).get_text_config()
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except Exception:
        return None


def counted(net: "torch.nn.Module") -> tuple[int, int, int, int]:
    """Parameters, those of routed experts, layers that have some, experts of a layer: by the names of the tensors."""
    tensors = {name: p for name, p in net.named_parameters() if "shared" not in name and "vision" not in name}
    routed = {name: p for name, p in tensors.items() if EXPERTS.search(name)}
    layers = {EXPERTS.search(name)[1] for name in routed}
    experts = {p.shape[0] for p in routed.values()}
    total = sum(p.numel() for p in net.parameters())
    return total, sum(p.numel() for p in routed.values()), len(layers), experts.pop() if len(experts) == 1 else 0


@pytest.mark.timeout(900)
def test_counts_equal_the_meta_model_in_nearly_all_families():
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    equal, refused, wrong = [], {}, {}
    for family in families():
        body = {"model_type": family, "num_hidden_layers": LAYERS}
        net = built(body) or built(body := {"model_type": family})
        if net is None:
            continue
        total, routed, layers, experts = counted(net)
        if not routed:  # the defaults of some families are dense models
            continue
        try:
            model = read_family(body, family, family, "")
        except MoeplanError as error:
            refused[family] = str(error)
            continue
        moe, ordinals = model.moe_block().moe, range(len(model.moe_layers))
        assert moe is not None
        ours = sum(model.moe_block(i).moe.num_experts * model.computed_expert_bytes(i, "f32") // 4 for i in ordinals)
        active = (
            total
            - routed
            + sum(model.moe_block(i).moe.top_k * model.computed_expert_bytes(i, "f32") // 4 for i in ordinals)
        )
        got = model.total_parameters(), ours, len(model.moe_layers), moe.num_experts, model.active_parameters()
        if got == (total, routed, layers, experts, active):
            equal.append(family)
        else:
            wrong[family] = got, (total, routed, layers, experts, active)
    assert len(equal) >= 45, equal
    assert not wrong, wrong
    assert all(family in message for family, message in refused.items()), refused
    assert len(equal) >= 0.95 * (len(equal) + len(refused)), refused


def config(tmp_path: Path, **fields: object) -> str:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return str(tmp_path)


def test_published_sizes(tmp_path: Path):
    """GLM-4.5-Air: 106 billion parameters, 12 of them active (arXiv 2508.06471), the embedding's not counted."""
    glm = {
        "model_type": "glm4_moe", "hidden_size": 4096, "num_hidden_layers": 46, "num_attention_heads": 96,
        "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "n_routed_experts": 128, "num_experts_per_tok": 8, "n_shared_experts": 1,
        "first_k_dense_replace": 1, "vocab_size": 151552, "torch_dtype": "bfloat16",
    }  # fmt: skip
    model = load_model(config(tmp_path, **glm))
    assert round(model.total_parameters() / 1e9, 1) == 106.9
    assert round((model.active_parameters() - 2 * 151552 * 4096) / 1e9) == 12
    assert (len(model.layers), model.moe_layers[0], model.moe_block().moe.top_k) == (46, 1, 8)
    assert model.cache_values() == 46 * 2 * 8 * 128
    assert model.expert_bytes() == 2 * 3 * 4096 * 1408
    assert not_executed(model) == ""
    assert "glm4_moe" in not_executed(model.model_copy(update={"family_config": None}))
    assert Model.parse(model.to_json(), "again") == model


def test_a_model_of_another_family_is_placed_and_solved_for_once_measured(tmp_path: Path, monkeypatch, capfd):
    """Its experts' bytes are in the placement, which explain shows."""
    body = {"model_type": "ernie4_5_moe", "num_hidden_layers": 9, "moe_num_experts": 16, "moe_k": 2}
    folder, placed = config(tmp_path, **body), tmp_path / "place.json"
    trace = Path(__file__).parents[1] / "examples/tiny_moe/trace.npz"
    argv = ["place", "--trace", trace, "--devices", 4, "--model", folder, "--steps", 1000, "-o", placed]
    assert moeplan(monkeypatch, capfd, *argv)[0] == 0
    model = load_model(folder)
    assert json.loads(placed.read_text())["expert_bytes"] == [model.expert_bytes(i) for i in range(8)]
    cluster = synthetic_cluster(load_model("mixtral"), 1, 2).write(tmp_path / "cluster.json")
    code, err = moeplan(monkeypatch, capfd, "solve", "--model", folder, "--cluster", cluster)
    assert code == 2
    assert "no mixer_decode curve" in err
    assert f"`moeplan profile --model {folder}" in err


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "no_such_family"}, "neither moeplan nor Transformers"),
        ({"model_type": "bert"}, "none of its layers has experts"),
        ({"model_type": "glm4_moe", "num_hidden_layers": 10**6}, "num_hidden_layers: at most 512"),
        ({"model_type": "glm4_moe", "n_routed_experts": 10**9}, "n_routed_experts: at most 65536"),
        ({"model_type": "glm4_moe", "hidden_size": "wide"}, "Transformers"),
        ({"model_type": "glm4_moe", "torch_dtype": "float64"}, "dtype: expected one of bfloat16"),
        ({"model_type": "glm4_moe", "quantization_config": {"quant_method": "vptq"}}, "weights in vptq"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path, monkeypatch, capfd, fields: dict, reason: str):
    assert fields["model_type"] not in READERS
    code, err = moeplan(monkeypatch, capfd, "models", config(tmp_path, **fields))
    assert code == 2
    assert reason in err
    assert len(err.strip().splitlines()) == 1


def test_modelopts_file_beside_a_configuration_is_not_overlooked(tmp_path: Path, monkeypatch, capfd):
    folder = config(tmp_path, model_type="glm4_moe", num_hidden_layers=3)
    assert moeplan(monkeypatch, capfd, "models", folder)[0] == 0
    plain = load_model(folder)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    model = load_model(folder)
    assert model.stored_in() == {"experts": "fp8", "rest": "fp8"}
    assert model.total_parameters() == plain.total_parameters()
    assert model.expert_bytes() == plain.expert_bytes(dtype="f32") // 4 + 3 * (4 + 4)  # a scale, and one of inputs
    assert [block.dequantised() for block in model.blocks] == list(plain.blocks)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W4A8_AWQ"}}))
    code, err = moeplan(monkeypatch, capfd, "models", folder)
    assert code == 2
    assert "quantization_config" in err
    assert "W4A8_AWQ" in err

"""An absent field means what Transformers' configuration class says: every field that a reader reads is left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub.errors import StrictDataclassError

from moeplan.benchmarks.families import SMALL, build, counted
from moeplan.spec.catalogue import load_model
from moeplan.spec.catalogue.defaults import DEFAULTS
from moeplan.spec.catalogue.fields import Fields
from moeplan.spec.catalogue.huggingface import READERS, read_config
from moeplan.spec.errors import MoeplanError
from moeplan.spec.model import Model

Body = dict[str, Any]
# Sizes by which one model differs from another: refused where they are absent, though the classes have them too.
REQUIRED = {
    *("hidden_size", "num_hidden_layers", "num_layers", "num_attention_heads", "vocab_size", "intermediate_size"),
    *(
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "num_local_experts",
        "num_experts",
        "n_routed_experts",
    ),
    *("d_model", "d_ff", "num_heads", "ffn_hidden_size", "expert_ffn_hidden_size"),
}


def full_body(family: str, arguments: Body, **changes: Any) -> Body:
    """Every field of the configuration, as its class writes it."""
    body: Body = json.loads(transformers.AutoConfig.for_model(family, **(arguments | changes)).to_json_string(False))
    return body | {"dtype": "float16"}


def config_of(body: Body) -> transformers.PretrainedConfig:
    given = {key: value for key, value in body.items() if key != "model_type"}
    return transformers.AutoConfig.for_model(body["model_type"], **given)


def by_class(body: Body) -> Body:
    """The configuration as its class completes it."""
    completed: Body = json.loads(config_of(body).to_json_string(False))
    return completed


def read(body: Body) -> Model:
    return read_config(body, "config.json", "x", "")


def renamed(name: str) -> str:
    """The name that errors use for a field with several."""
    return "num_(local_)?experts" if name in ("num_experts", "num_local_experts") else name


@pytest.fixture
def fields_read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the fields that readers look for from now on."""
    seen: set[str] = set()
    find = Fields.find

    def spy(self: Fields, *names: str) -> tuple[str, Any]:
        seen.update(names)
        return find(self, *names)

    monkeypatch.setattr(Fields, "find", spy)
    return seen


@pytest.mark.parametrize("case", SMALL)
def test_each_absent_field_is_what_the_class_says(case: str, fields_read: set[str]) -> None:
    family, arguments = SMALL[case]
    body = full_body(family, arguments)
    assert read(body) == read(by_class(body)).model_copy(update={"dtype": "f16"})
    compared = 0
    for name in sorted(fields_read & set(body)):
        without = {key: value for key, value in body.items() if key != name}
        if name == "layer_types" and without.get("use_sliding_window"):
            with pytest.raises(MoeplanError, match="layer_types"):
                read(without)  # the rule of Qwen2-MoE's class has changed over time
            continue
        if name in REQUIRED or (name == "num_experts_per_tok" and family == "deepseek_v2"):  # its class has none
            with pytest.raises(MoeplanError, match=f"{renamed(name)}: missing"):
                read(without)
            continue
        theirs = by_class(without)
        theirs["dtype"] = theirs["dtype"] or "float32"  # without one, Transformers builds float32
        try:
            wanted = read(theirs)
        except MoeplanError:  # such as 8 groups of 6 experts
            with pytest.raises(MoeplanError):
                read(without)
        else:
            assert read(without) == wanted, name
        compared += 1
    assert compared >= 8


@pytest.mark.parametrize("family", READERS)
def test_the_table_of_defaults_is_that_of_the_classes(family: str) -> None:
    config = transformers.AutoConfig.for_model(family)
    whole = config.to_dict() | {"rope_theta": (config.to_dict().get("rope_parameters") or {}).get("rope_theta")}
    plain = type(config)  # what a class's __post_init__ rewrites is read from the class itself
    for name, value in DEFAULTS[family].items():
        theirs = getattr(plain, name, None) if name in ("sliding_window", "mlp_only_layers") else whole.get(name)
        if name == "router_bias" and family == "longcat_flash":
            theirs = theirs or False  # read by the module, with this default
        assert value == theirs, name


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe", "qwen2_moe"])
@pytest.mark.parametrize("absent", [("num_key_value_heads",), ("head_dim",), ("num_key_value_heads", "head_dim")])
def test_heads_as_transformers_builds_them(family: str, absent: tuple[str, ...]) -> None:
    """By the size of the projections, as a class's value could still be read wrongly. 64 heads fit every default."""
    given = SMALL[family][1] | {"num_attention_heads": 64, "hidden_size": 256}
    body = {k: v for k, v in full_body(family, given).items() if k not in absent}
    theirs = counted(build(config_of(body)))
    model = read(body)
    assert (model.total_parameters(), model.cache_values()) == (theirs.total, theirs.cache)


@pytest.mark.parametrize("family", READERS)
def test_null_is_read_as_the_class_reads_it(family: str, fields_read: set[str]) -> None:
    """Where the class accepts null."""
    body = full_body(family, SMALL[family][1])
    read(body)
    compared = 0
    for name in sorted(fields_read & set(body)):
        nulled = body | {name: None}
        try:
            built = counted(build(config_of(nulled)))
        except (StrictDataclassError, TypeError, AttributeError, ValueError, RuntimeError):
            continue  # the class or its modules refuse it: then we may take the default
        model = read(nulled)
        assert (model.total_parameters(), model.cache_values()) == (built.total, built.cache), name
        compared += 1
    assert compared >= 2


def test_absent_dtype_is_float32(tmp_path: Path) -> None:
    body = {k: v for k, v in full_body("mixtral", SMALL["mixtral"][1]).items() if k != "dtype"}
    (tmp_path / "config.json").write_text(json.dumps(body))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert str(transformers.AutoModelForCausalLM.from_config(config).dtype) == "torch.float32"
    assert load_model(str(tmp_path)).dtype == "f32"


# Rotary embeddings

LAYERED = {
    "full_attention": {"rope_theta": 5e5, "rope_type": "default"},
    "sliding_attention": {"rope_theta": 2e4, "rope_type": "default"},
}


def rope_of(model: Model) -> list[float]:
    """Base of each layer."""
    found = [block.attention.rope_theta if block.attention else None for block in model.layers]
    assert model.rope_theta is not None
    return [theta or model.rope_theta for theta in found]


@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe, no bias, windows"])
def test_rope_by_layer_type(family: str) -> None:
    name, arguments = SMALL[family]
    body = full_body(name, arguments, rope_parameters=LAYERED)
    assert set(body["rope_parameters"]) == set(LAYERED)  # Transformers keeps them apart
    assert rope_of(read(body)) == [LAYERED[kind]["rope_theta"] for kind in body["layer_types"]]
    assert set(body["layer_types"]) == set(LAYERED)


def test_one_base_for_both_layer_types_is_the_models() -> None:
    same = {kind: {"rope_theta": 3e4, "rope_type": "default"} for kind in LAYERED}
    model = read(full_body("gpt_oss", SMALL["gpt_oss"][1], rope_parameters=same))
    assert model.rope_theta == 3e4
    assert all(block.attention and block.attention.rope_theta is None for block in model.layers)


@pytest.mark.parametrize(
    ("family", "changes", "parts"),
    [
        ("mixtral", {"rope_parameters": LAYERED}, ["rope_parameters", "by layer type", "full_attention"]),
        ("gpt_oss", {"rope_parameters": {"full_attention": LAYERED["full_attention"]}}, ["nothing for the sliding"]),
        (
            "gpt_oss",
            {"rope_parameters": LAYERED | {"sliding_attention": None}},
            ["sliding_attention", "without a rotary"],
        ),
        ("gpt_oss", {"rope_parameters": LAYERED | {"sliding_attention": {"rope_theta": "x"}}}, ["rope_theta", "'x'"]),
        ("gpt_oss", {"rope_parameters": {"diagonal": {}}}, ["rope_parameters", "diagonal"]),
    ],
)
def test_rope_that_cannot_be_read_is_named(family: str, changes: Body, parts: list[str]) -> None:
    with pytest.raises(MoeplanError) as caught:
        read(full_body(family, SMALL[family][1]) | changes)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "deepseek_v3", "longcat_flash"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 7e4},
        {"rope_parameters": {"rope_theta": 8e4, "rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 9e4},
        {"rope_scaling": {"rope_type": "default"}, "rope_theta": 9e4},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 6e4}, "rope_parameters": {"rope_theta": 8e4}},
        {},
    ],
)
def test_the_base_is_the_classs(family: str, rope: Body) -> None:
    body = {k: v for k, v in full_body(family, SMALL[family][1]).items() if not k.startswith("rope_")} | rope
    assert read(body).rope_theta == by_class(body)["rope_parameters"]["rope_theta"]

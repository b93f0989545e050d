"""What a configuration says of the stored weights, in the forms that checkpoints are published with."""

import itertools

import pytest
from transformers.quantizers.quantizers_utils import should_convert_module

from moeplan.spec.errors import DocumentError
from moeplan.spec.quantization import WeightFormat, read_quantization
from moeplan.tests.quantised import BLOCK_FP8, compressed

GPT_OSS = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
EXPERT, QUERY, ROUTER = (f"model.layers.3.{n}" for n in ("mlp.experts.17.up_proj", "self_attn.q_proj", "mlp.gate"))


def read(config, hf=None):
    return read_quantization({"model_type": "qwen3_moe", "quantization_config": config}, hf)


@pytest.mark.parametrize(
    ("config", "name", "layout"),
    [
        (BLOCK_FP8, "fp8", WeightFormat("float", 8, "block", (128, 128))),
        ({"quant_method": "fp8", "weight_block_size": None}, "fp8", WeightFormat("float", 8, "tensor")),
        (BLOCK_FP8 | {"scale_fmt": "ue8m0"}, "fp8", WeightFormat("float", 8, "block", (128, 128), scale_bytes=1)),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8", WeightFormat("float", 8, "channel")),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128},
            "gptq",
            WeightFormat("int", 4, "group", (1, 128), symmetric=False, scale_bytes=2),
        ),
        (
            {"quant_method": "awq", "w_bit": 4, "q_group_size": 64},
            "awq",
            WeightFormat("int", 4, "group", (1, 64), symmetric=False, scale_bytes=2),
        ),
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
            "modelopt (NVFP4)",
            WeightFormat("float", 4, "group", (1, 16), scale_bytes=1),
        ),
        (
            compressed("channel", "int", symmetric=False),
            "compressed-tensors (int-quantized)",
            WeightFormat("int", 8, "channel", symmetric=False, scale_bytes=2, storage="int-quantized"),
        ),
    ],
)
def test_schemes(config, name, layout):
    found = read(config)
    assert found is not None
    assert (found.name, found.formats) == (name, (layout,))
    assert found.format_of(EXPERT) == layout


def test_other_places_of_the_configuration():
    assert read_quantization({"model_type": "mixtral"}) is None
    assert read_quantization({"quantization_config": None}) is None
    for body in (
        {"text_config": {"quantization_config": BLOCK_FP8}},
        {"compression_config": compressed("tensor", "float")},
    ):
        assert read_quantization(body) is not None
    hf = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    for found in (read_quantization({}, hf), read({"quant_method": "modelopt"}, hf)):
        assert found is not None
        assert (found.name, found.cache) == ("modelopt (FP8)", True)
    caches_only = read({"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}})
    assert caches_only is not None
    assert (caches_only.weights, caches_only.cache) == (False, True)


def test_parts_that_stay_plain():
    mxfp4 = read(GPT_OSS)
    assert mxfp4 is not None
    assert str(mxfp4.format_of("model.layers.3.mlp.experts")) == "fp4 per group 1x32"
    assert all(
        mxfp4.format_of(m) is None for m in (QUERY, "model.layers.3.mlp.router", "lm_head", "model.embed_tokens")
    )
    groups = compressed("channel", "float") | {"ignore": ["lm_head", r"re:.*mlp\.gate$"]}
    groups["config_groups"]["attention"] = {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 8, "type": "int"}}
    groups["config_groups"]["group_0"]["targets"] = [r"re:.*experts\.\d+\..*"]
    found = read(groups)
    assert found is not None
    kinds = [found.format_of(m) for m in (EXPERT, QUERY, ROUTER, "lm_head")]
    assert [k and k.type for k in kinds] == ["float", "int", None, None]


def test_lists_mean_what_transformers_takes_them_for():
    modules = [
        EXPERT,
        QUERY,
        ROUTER,
        "lm_head",
        "model.layers.13.mlp.gate_proj",
        "model.layers.1",
        "model.layers.11.mlp",
    ]
    patterns = [
        "lm_head",
        "mlp.gate",
        "model.layers.1",
        "model.layers.*.self_attn",
        "q_proj",
        ".*experts",
        "model.layers.3.",
    ]
    for some in itertools.chain(([p] for p in patterns), itertools.combinations(patterns, 3)):
        found = read(BLOCK_FP8 | {"modules_to_not_convert": list(some)})
        assert found is not None
        for module in modules:
            assert found.ignores(module) != should_convert_module(module, list(some)), (module, some)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(", "[", "a*b*c*d*e*", "(?P<n>x)", "x" * 600, r"(a)\1"])
def test_patterns_that_could_take_hours_are_refused(pattern):
    with pytest.raises(DocumentError, match="modules_to_not_convert: not a usable pattern"):
        read(BLOCK_FP8 | {"modules_to_not_convert": [pattern]})

"""Published configurations of families that are read through Transformers: their sizes are the published ones.

``published_configs.json`` holds the fields that matter of each repository's ``config.json``, as NVIDIA's planner ships
them (each with where). Counts are billions, from the model's name, card or report.
"""

import json
from pathlib import Path

import pytest

from moeplan.profiler.families import read_family
from moeplan.spec import Model
from moeplan.spec.errors import DocumentError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear  # noqa: E402

CONFIGS = json.loads((Path(__file__).parent / "published_configs.json").read_text())
# Billions in all and for one token. Totals of models with other inputs count their encoders too (at most 2 % of these),
# and rounding; active ones count both embedding matrices, one or none.
PUBLISHED = {
    "MiniMaxAI/MiniMax-M2.5": (230, 10),  # its card: as MiniMax-M2's
    "XiaomiMiMo/MiMo-V2-Flash": (309, 15),  # its card
    "Qwen/Qwen3-Next-80B-A3B-Thinking": (80, 3),  # its name
    "Qwen/Qwen3.5-35B-A3B": (35, 3),
    "Qwen/Qwen3.5-122B-A10B": (122, 10),
    "Qwen/Qwen3.5-397B-A17B": (397, 17),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": (30.5, 3.3),  # its text part is Qwen3-30B-A3B, whose card has these
    "Qwen/Qwen3-VL-235B-A22B-Instruct": (235, 22),
    "deepseek-ai/DeepSeek-V3.2": (671, 37),  # as DeepSeek-V3 (arXiv 2412.19437)
    "deepseek-ai/DeepSeek-V4-Flash": (284, 13),  # its card
    "deepseek-ai/DeepSeek-V4-Pro": (1600, 49),
    "google/gemma-4-26B-A4B": (25.2, 3.8),  # its card
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (109, 17),  # their card
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": (400, 17),
    "moonshotai/Kimi-K2.5": (1040, 32),  # as Kimi K2 (arXiv 2507.20534)
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": (31.6, 3.6),  # NVIDIA's page: 3.2 without embeddings
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8": (120, 12),  # its name
    "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": (550, 55),
    "zai-org/GLM-5": (744, 40),  # its report's table
    "zai-org/GLM-4.7-Flash": (30, 3),  # its name on its card: 30B-A3B
    "stepfun-ai/Step-3.7-Flash": (196, 11),  # the text part, beside 1.8 of an encoder
}
# The scheme of the experts, and bytes of one of their weights with its share of the scales.
STORED = {
    "MiniMaxAI/MiniMax-M2.5": ("fp8", 1 + 4 / 128**2),
    "XiaomiMiMo/MiMo-V2-Flash": ("fp8", 1 + 4 / 128**2),
    "deepseek-ai/DeepSeek-V3.2": ("fp8", 1 + 1 / 128**2),
    "deepseek-ai/DeepSeek-V4-Flash": ("fp4", 1 / 2 + 1 / 32),
    "moonshotai/Kimi-K2.5": ("int4", 1 / 2 + 2 / 32),
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8": ("fp8", 1),
    "nvidia/MiniMax-M2.5-NVFP4": ("nvfp4", 1 / 2 + 1 / 16),
    "stepfun-ai/Step-3.7-Flash-FP8": ("fp8", 1 + 4 / 128**2),
}
# Bytes of a matrix beside: its scale, and that of its inputs.
BESIDE = {"nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8": 8, "nvidia/MiniMax-M2.5-NVFP4": 8}
# Of these schemes nothing but experts is covered.
EXPERTS_ONLY = ("moonshotai/Kimi-K2.5", "nvidia/MiniMax-M2.5-NVFP4")


def read(name: str) -> Model:
    return read_family(CONFIGS[name]["config"], name, name.split("/")[1], "")


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str) -> None:
    total, active = PUBLISHED[name]
    model = read(name)
    assert model.total_parameters() / 1e9 == pytest.approx(total, rel=0.02)
    matrices = 1 if model.tie_embeddings else 2
    inside = model.active_parameters() - matrices * model.vocab_size * model.layers[0].hidden_size
    assert 0.98 * inside / 1e9 <= active + 0.5
    assert active - 0.5 <= 1.02 * model.active_parameters() / 1e9


@pytest.mark.parametrize(("name", "total", "active"), [("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 31.6, 3.6)])
def test_counts_to_the_last_published_digit(name: str, total: float, active: float) -> None:
    model = read(name)
    assert round(model.total_parameters() / 1e9, 1) == total
    assert round(model.active_parameters() / 1e9, 1) == active


@pytest.mark.parametrize("name", STORED)
def test_quantised_ones_are_counted_as_stored(name: str) -> None:
    scheme, each = STORED[name]
    model = read(name)
    assert model.stored_in()["experts"] == scheme
    block = model.moe_block()
    assert block.moe is not None
    matrices = 3 if block.moe.gated else 2
    values = block.moe.expert_parameters(block.hidden_size)
    assert model.expert_bytes() == values * each + matrices * BESIDE.get(name, 0)
    rest = sum(b.always_on_parameters() for b in model.layers) + model.embedding_parameters()
    if name in EXPERTS_ONLY:
        assert model.rest_bytes() == 2 * rest
    else:
        assert rest < model.rest_bytes() < 2 * rest


FP8 = ("MiniMaxAI/MiniMax-M2.5", "XiaomiMiMo/MiMo-V2-Flash")


@pytest.mark.parametrize("name", FP8)
def test_fp8_is_as_transformers_allocates_it(name: str) -> None:
    """Every tensor of the layers, with the modules that Transformers puts in place of the model's."""
    body = {key: value for key, value in CONFIGS[name]["config"].items() if key != "quantization_config"}
    given = CONFIGS[name]["config"]["quantization_config"]
    config = transformers.AutoConfig.for_model(body.pop("model_type"), **body)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    quantizer = transformers.FineGrainedFP8Config(**given)
    replace_with_fp8_linear(net, [*(quantizer.modules_to_not_convert or []), "lm_head"], quantizer)
    allocated = sum(p.nbytes for p in net.model.layers.parameters())
    model = read(name)
    experts = sum(model.expert_bytes(i) * model.moe_block(i).moe.num_experts for i in range(len(model.moe_layers)))
    assert experts + sum(b.always_on_bytes(2) for b in model.layers) == allocated


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt e5m2"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*": {}}}, "with dynamic"),
    ],
)
def test_unknown_schemes_are_refused_by_name(scheme: dict, said: str) -> None:
    body = {"model_type": "glm4_moe", "num_hidden_layers": 3, "quantization_config": scheme}
    with pytest.raises(DocumentError, match=f"^c: quantization_config: how many bytes weights in .*{said}"):
        read_family(body, "c", "n", "")

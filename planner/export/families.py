"""What each engine does with a placement, family by family, as its own sources say it.

A cell answers three questions. Hook: does the engine ask this model class for a placement? Loader: do the experts'
weights follow it? Balancer: does the engine's own balancer work on this class? ``use`` is what ``export`` makes of the
answers, and ``docs/engines.md`` prints the same cells (``tables``).
"""

from dataclasses import dataclass
from typing import Literal

from ...spec.document import show
from ...spec.errors import MoeplanError
from ...spec.model import Model
from .common import Engine

Use = Literal["yes", "note", "refuse", "unknown"]


@dataclass(frozen=True)
class Cell:
    """One engine and one model family, in the version that the engine's exporter names.

    use: ``yes`` exports; ``note`` exports and says why less happens than planned; ``refuse`` stops with ``why``;
    ``unknown`` exports and says that nobody looked. source: files and classes of the engine.
    """

    use: Use
    hook: str
    loader: str
    balancer: str
    source: str
    why: str = ""


UNKNOWN = Cell("unknown", "not known", "not known", "not known", "not read")

_SGLANG_LAYER = "srt/layers/moe/fused_moe_triton/layer.py FusedMoE.weight_loader"


def _sglang(file: str, name: str) -> Cell:
    return Cell(
        "yes",
        "yes",
        "follows it",
        "yes",
        f"srt/models/{file} {name}.get_model_config_for_expert_location; {_SGLANG_LAYER}",
    )


def _no_hook(file: str, name: str) -> Cell:
    return Cell(
        "refuse",
        "none: assertion at the first request",
        "experts in order",
        "no",
        f"srt/models/{file} {name}; srt/eplb/expert_location_dispatch.py ExpertLocationDispatchInfo.init_new",
        f"{name} has no get_model_config_for_expert_location: with any placement the server stops at its first request "
        '("Expert dispatch requires placement metadata"); start it without one, with experts in order',
    )


_SGLANG = {
    "deepseek_v2": _sglang("deepseek_v2.py", "DeepseekV2ForCausalLM"),
    "deepseek_v3": _sglang("deepseek_v2.py", "DeepseekV3ForCausalLM"),
    "gpt_oss": Cell(
        "refuse",
        "yes: ids are remapped",
        "ignores it: experts in order",
        "yes, with the same fault",
        "srt/models/gpt_oss.py GptOssForCausalLM._load_mxfp4_experts_weights, ._load_normal_weights; "
        "srt/layers/moe/fused_moe_triton/layer.py FusedMoE.weight_loader_fused",
        "the ids of gpt-oss are remapped by the placement, but its loaders put the experts in order whatever it says, "
        "so tokens would silently reach wrong experts; start it without a placement",
    ),
    "longcat_flash": Cell(
        "refuse",
        "yes, but zero experts refuse it",
        "none for copies",
        "no",
        "srt/models/longcat_flash.py LongcatFlashMoE.__init__",
        "LongCat's zero experts do not support expert placement (the server refuses to start); start it without one",
    ),
    "mixtral": _no_hook("mixtral.py", "MixtralForCausalLM"),
    "olmoe": _no_hook("olmoe.py", "OlmoeForCausalLM"),
    "qwen2_moe": _sglang("qwen2_moe.py", "Qwen2MoeForCausalLM"),
    "qwen3_moe": _sglang("qwen3_moe.py", "Qwen3MoeForCausalLM"),
}

_TRT_LIST = "_torch/modules/fused_moe/moe_load_balancer.py moe_model_arch_list"
_TRT = Cell(
    "yes",
    "yes",
    "follows it",
    "yes",
    f"{_TRT_LIST}; _torch/modules/fused_moe/interface.py MoE._init_load_balancer",
)
_TRT_SILENT = Cell(
    "refuse",
    "none: silently ignored",
    "experts in order",
    "no",
    f"{_TRT_LIST}, maybe_create_moe_load_balancer",
    "its balancer acts for DeepSeek-V3, Mixtral, Llama-4, Qwen2-MoE and Qwen3-MoE classes only, and "
    "silently ignores a placement for any other; start it without one",
)
_TENSORRT_LLM = dict.fromkeys(("deepseek_v3", "llama4", "mixtral", "qwen2_moe", "qwen3_moe"), _TRT)
_TENSORRT_LLM |= dict.fromkeys(("deepseek_v2", "gpt_oss", "longcat_flash", "olmoe"), _TRT_SILENT)

_VLLM_LOADER = "linear, by flags"
_VLLM_GROUPS = "linear, or round robin with expert groups, by flags"
_VLLM_MAP = "model_executor/layers/fused_moe/expert_map_manager.py determine_expert_map"


def _vllm(file: str, name: str, loader: str = _VLLM_LOADER) -> Cell:
    return Cell(
        "yes",
        "none is loaded",
        loader,
        "yes",
        f"model_executor/models/{file} {name}(MixtureOfExperts); {_VLLM_MAP}",
    )


def _not_balanced(file: str, name: str) -> Cell:
    return Cell(
        "note",
        "none is loaded",
        _VLLM_LOADER,
        "does nothing",
        f"model_executor/models/{file} {name}; model_executor/models/interfaces.py is_mixture_of_experts",
        f"vLLM's balancer does nothing for this model ({name} is no MixtureOfExperts)",
    )


_VLLM = {
    "deepseek_v2": _vllm("deepseek_v2.py", "DeepseekV2ForCausalLM", _VLLM_GROUPS),
    "deepseek_v3": _vllm("deepseek_v2.py", "DeepseekV3ForCausalLM", _VLLM_GROUPS),
    "gpt_oss": _not_balanced("gpt_oss.py", "GptOssForCausalLM"),
    "longcat_flash": _not_balanced("longcat_flash.py", "LongcatFlashForCausalLM"),
    "mixtral": _vllm("mixtral.py", "MixtralForCausalLM"),
    "olmoe": _not_balanced("olmoe.py", "OlmoeForCausalLM"),
    "qwen2_moe": _not_balanced("qwen2_moe.py", "Qwen2MoeForCausalLM"),
    "qwen3_moe": _vllm("qwen3_moe.py", "Qwen3MoeForCausalLM"),
}

_ASCEND = Cell(
    "yes",
    "model runner V1 only",
    "follows it",
    "yes (dynamic_eplb)",
    "eplb/core/eplb_utils.py init_eplb_config, expert_file_to_tensor; ops/fused_moe/fused_moe_0_23_0.py AscendFusedMoE",
)
_VLLM_ASCEND = dict.fromkeys(("deepseek_v2", "deepseek_v3", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"), _ASCEND) | {
    "gpt_oss": Cell(
        "refuse",
        "model runner V1 only: ids are remapped",
        "ignores it: experts in order",
        "not known",
        "eplb/core/eplb_utils.py init_eplb_config; vLLM model_executor/models/gpt_oss.py GptOssModel.load_weights",
        "the ids of gpt-oss are remapped by the map, but vLLM's loader of gpt-oss slices experts in order whatever it "
        "says, so tokens would reach wrong experts; start it without a map",
    ),
}

_MEGATRON_CELL = Cell(
    "yes",
    "none: contiguous blocks",
    "by a permuted checkpoint",
    "none",
    "core/transformer/moe/moe_layer.py BaseMoELayer (local_expert_indices)",
)
_MEGATRON = dict.fromkeys(
    ("deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"), _MEGATRON_CELL
)


def _autoep(preset: str) -> Cell:
    return Cell(
        "yes",
        "none: contiguous blocks",
        "by a permuted checkpoint",
        "none",
        f"module_inject/auto_ep_presets/{preset}.py; moe/ep_repack.py repack_expert_weights",
    )


_DEEPSPEED = {
    "deepseek_v2": _autoep("deepseek_v2"),
    "deepseek_v3": _autoep("deepseek_v3"),
    "gpt_oss": Cell(
        "refuse",
        "no preset",
        "drops expert biases, splits interleaved rows in halves",
        "none",
        "module_inject/auto_ep.py AutoEP.ep_parser; moe/ep_repack.py repack_expert_weights",
        "AutoEP has no preset for gpt-oss, and its repacking drops the experts' biases and takes halves of rows that "
        "gpt-oss interleaves, so the model would compute something else",
    ),
    "longcat_flash": Cell(
        "refuse",
        "no preset",
        "no zero experts",
        "none",
        "module_inject/auto_ep_presets/registry.py PRESET_MODELS; module_inject/auto_ep.py AutoEP.ep_parser",
        "AutoEP has no preset for LongCat-Flash, and no zero experts",
    ),
    "mixtral": _autoep("mixtral"),
    "olmoe": Cell(
        "yes",
        "none: contiguous blocks",
        "by a permuted checkpoint",
        "none",
        "module_inject/auto_ep_presets/registry.py _build_custom_preset (patterns); moe/ep_repack.py",
    ),
    "qwen2_moe": _autoep("qwen3_moe"),
    "qwen3_moe": _autoep("qwen3_moe"),
}

TABLE: dict[str, dict[str, Cell]] = {
    "sglang": _SGLANG,
    "tensorrt-llm": _TENSORRT_LLM,
    "vllm": _VLLM,
    "vllm-ascend": _VLLM_ASCEND,
    "megatron": _MEGATRON,
    "deepspeed": _DEEPSPEED,
}


def cell_of(engine: str, model: Model) -> Cell:
    """The cell of this engine for this model; UNKNOWN where nobody looked."""
    if model.family == "longcat_flash" and not any(block.moe and block.moe.zero_experts for block in model.blocks):
        return UNKNOWN  # what is known of LongCat rests on its zero experts
    return TABLE[engine].get(model.family, UNKNOWN)


def notes_of(engine: Engine, model: Model) -> list[str]:
    """What the table says of this engine and this model; MoeplanError where the engine cannot use a placement."""
    cell = cell_of(engine.name, model)
    if cell.use == "refuse":
        raise MoeplanError(f"model {model.name!r} ({model.family}): {engine.title} {engine.version}: {cell.why}")
    if cell.use == "unknown":
        return [
            f"not known to work: what {engine.title} {engine.version} does with a placement of a model of family "
            f"{show(model.family)} was not read in its sources"
        ]
    return [cell.why] if cell.why else []

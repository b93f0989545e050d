"""DeepSpeed: AutoEP's section of the JSON configuration. It has no input for a placement.

    {"expert_parallel": {"enabled": true, "autoep_size": 4, "preset_model": "mixtral"}}

Rank r holds the r-th of ``autoep_size`` contiguous blocks of experts, which must be equally long. A family without a
preset is described by patterns (``moe_layer_pattern``, ``router_pattern``, ``expert_pattern`` and the names of the
configuration's fields), where its experts are laid out as AutoEP expects. Other models are built by hand with
``deepspeed.moe.layer.MoE(num_experts=, ep_size=, k=)``.
Source: module_inject/auto_ep_config.py, auto_ep_presets; runtime/engine.py _validate_zero3_moe_compatibility.
"""

import json
import re

from pydantic import ConfigDict

from ...spec.document import Part, show
from ...spec.errors import DocumentError, MoeplanError
from ...spec.placement import Placement
from .common import Engine, Export, PathOf, Slots, Target, linear_slots, parse_as, planned_slots, same

FILE = "deepspeed-expert-parallel.json"
# Model family -> preset.
PRESETS = {
    "mixtral": "mixtral",
    "qwen2_moe": "qwen3_moe",
    "qwen3_moe": "qwen3_moe",
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
}
# Model family -> patterns, for Transformers' modules: a router without bias, fused expert matrices in halves.
PATTERNS = {
    "olmoe": {
        "moe_layer_pattern": r"model\.layers\.\d+\.mlp",
        "router_pattern": "gate",
        "expert_pattern": "experts",
        "num_experts_attr": "num_experts",
        "top_k_attr": "num_experts_per_tok",
    }
}
ZERO = (
    "merge the section into your configuration; ZeRO stages 0 to 3, stage 3 without sequence parallelism, quantised "
    "gradients and hpZeRO, and with AutoEP only: deepspeed.moe.layer.MoE refuses it"
)


class _AutoEP(Part):
    enabled: bool
    autoep_size: int
    preset_model: str | None = None
    moe_layer_pattern: str | None = None
    router_pattern: str | None = None
    expert_pattern: str | None = None
    num_experts_attr: str | None = None
    top_k_attr: str | None = None


class _Config(Part):
    model_config = ConfigDict(extra="ignore")  # beside the section, the user's own configuration

    expert_parallel: _AutoEP


def write(placement: Placement, target: Target, path_of: PathOf) -> Export:
    model, ranks = target.model, target.ranks
    if target.experts % ranks:
        raise MoeplanError(f"{target.experts} experts do not divide between {ranks} ranks, as DeepSpeed demands")
    if model.family in PRESETS:
        kind = {"preset_model": PRESETS[model.family]}
    elif model.family in PATTERNS:
        kind = PATTERNS[model.family]
    else:
        moe = model.moe_block().moe
        assert moe is not None
        raise MoeplanError(
            f"DeepSpeed's AutoEP has no preset for {model.family!r} (it has {', '.join(PRESETS)}) and is not known to "
            "work for it: name its modules (moe_layer_pattern, router_pattern, expert_pattern) yourself, or build the "
            f"model with deepspeed.moe.layer.MoE(num_experts={target.experts}, ep_size={ranks}, k={moe.top_k})"
        )
    text = json.dumps({"expert_parallel": {"enabled": True, "autoep_size": ranks} | kind}, indent=1) + "\n"
    notes = [ZERO]
    if same(planned_slots(placement), linear_slots(target)):
        notes.append("the placement is linear, which is what DeepSpeed does: nothing of it is lost")
    else:
        notes.append(
            "dropped: the whole placement; DeepSpeed puts contiguous blocks of experts on its ranks; a placement "
            "without copies works if the checkpoint is permuted by what `moeplan export --to megatron` writes"
        )
    if not placement.single_copy:
        notes.append("dropped: the copies; DeepSpeed holds every expert once per expert-parallel group")
    return Export(ENGINE.name, ENGINE.version, {FILE: text}, ["--deepspeed_config", path_of(FILE)], notes)


def read(text: str, where: str, target: Target) -> Slots:
    """The linear placement, DeepSpeed's only one, if the section fits the model and the ranks."""
    section = parse_as(_Config, text, where).expert_parallel
    field = f"{where}: expert_parallel"
    if not section.enabled:
        raise DocumentError(f"{field}.enabled: false, expected true")
    if section.autoep_size != target.ranks:
        raise DocumentError(f"{field}.autoep_size: {section.autoep_size}, expected {target.ranks} ranks")
    if target.experts % section.autoep_size:
        raise DocumentError(f"{field}.autoep_size: {section.autoep_size} does not divide {target.experts} experts")
    _check_kind(section, field, target)
    return linear_slots(target)


def _check_kind(section: _AutoEP, field: str, target: Target) -> None:
    """A preset, which must be the family's; or patterns, which are the user's own choice for any family."""
    expected = PRESETS.get(target.model.family)
    if section.preset_model is None:
        if section.moe_layer_pattern is None and expected is None:
            raise DocumentError(
                f"{field}.moe_layer_pattern: missing, AutoEP has no preset for {target.model.family!r} and tries all"
            )
        try:
            re.compile(section.moe_layer_pattern or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise DocumentError(f"{field}.moe_layer_pattern: not a regular expression ({show(str(error))})") from None
    elif section.preset_model != expected:
        raise DocumentError(
            f"{field}.preset_model: {show(section.preset_model)}, "
            + (f"expected {expected!r}" if expected else f"but there is no preset for {target.model.family!r}")
        )


ENGINE = Engine("deepspeed", "DeepSpeed", "0.19.8", (FILE,), write, read)

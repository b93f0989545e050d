"""What moeplan's runtime executes, by itself or with Transformers' modules: one list for `profile`, `solve` and `run`.

A model outside the list is still described, and everything that needs no curves works: `place` without a cluster,
`explain`, `compare` and `export`.
"""

from .counted import Counted
from .errors import MoeplanError
from .model import Block, Model
from .shortcut import missing_before

ELSE = "`moeplan place` (without --cluster), `explain` and `compare` work, and `export` to engines that take it"


def check_executed(model: Model, asked: str = "") -> None:
    """Raise MoeplanError naming the first thing of ``model`` that the runtime does not execute.

    asked: what the user typed for the model; by default its name.
    """
    missing = not_executed(model)
    if missing:
        raise MoeplanError(
            f"{asked or model.name}: {missing}, so that it cannot be profiled, solved for or run; {ELSE}"
        )


def not_executed(model: Model) -> str:
    """The same as text, "layer 0: the runtime does not execute attention sinks"; "" where there is nothing."""
    for i, block in enumerate(model.layers):
        missing = _missing(model, block) or missing_before(model, i)
        if missing:
            return f"layer {i}: the runtime does not execute {missing}"
    return ""


def _missing(model: Model, block: Block) -> str:
    a = block.attention
    if block.counted:
        return _not_by_transformers(model, block.counted)
    if not model.causal:
        return "non-causal models"
    if block.hidden_size != model.layers[0].hidden_size:
        return "hidden sizes that change between layers"
    if block.dense and block.moe and block.shortcut == "none":
        return "a dense FFN beside the experts of one layer"
    if a is not None:
        if a.kind != "gqa":
            return f"{a.kind} attention"
        if a.cross:
            return "cross-attention (encoder-decoder models)"
        if a.sinks:
            return "attention sinks"
        if a.position_buckets:
            return "learned relative positions"
        if a.rope_theta is not None:
            return "rotary embeddings that differ between layers"
    if block.moe and "own" in (block.moe.gate.score, block.moe.activation):
        return f"the gate or activation of family {model.family}, which only Transformers computes"
    for ffn in (block.dense, block.moe):
        if ffn is not None and ffn.activation == "swiglu_clamped":
            return "the clamped SwiGLU activation"
        if ffn is not None and ffn.bias:
            return "biases in the FFN"
    if block.moe and block.moe.gate.score == "expert_choice":
        return "expert choice in a causal model: whether an expert takes a token depends on tokens that come later"
    if block.moe and block.moe.zero_experts and block.moe.gate.groups > 1:
        return "group-limited routing with identity experts, which belong to no group"
    return ""


def _not_by_transformers(model: Model, counted: Counted) -> str:
    """Why Transformers' own modules cannot stand in for a layer that is known by its size."""
    kept = model.family_config
    if kept is not None and kept.missing:
        return f"layers of family {model.family}: {kept.missing}"
    if kept is None or not counted.signature:
        return f"layers of family {model.family}, of which it knows the size only ({counted.made_of})"
    return ""

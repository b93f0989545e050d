"""Router logits of a Transformers model (`output_router_logits=True`): per layer [tokens, E] or [batch, tokens, E].

`torch.save(tuple(output.router_logits), "logits.pt")`, or the layers as arrays of an npz or a safetensors file, which
are taken in the natural order of their names (layer_2 before layer_10).

Logits tell a model's experts only where it takes the highest ones. Many families do not: a correction bias that is no
part of the logits (DeepSeek-V3, GLM-4, ERNIE 4.5, MiniMax-M2, LongCat-Flash, whose 768 columns are 512 experts and 256
identity ones), groups, or further tensors among the layers (JetMoe: attention has experts too). Read in the modeling
files of Transformers 5.23.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ....spec.document import show
from ....spec.errors import DocumentError
from ....spec.model import MAX_EXPERTS, MAX_LAYERS
from ....spec.trace import Trace
from .files import natural, read_npz, read_safetensors, read_torch, to_array
from .options import Options, agree
from .records import agree_with_model, limit_choices, ranges

# Families whose experts are those of the highest logits, with nothing else among the layers.
HIGHEST = """
dbrx flex_olmo gpt_oss granitemoe granitemoeshared hunyuan_v1_moe jamba llama4_text minimax mixtral olmoe phimoe
qwen2_moe qwen3_moe qwen3_next
"""
BIASED = """
afmoe axk1 bailing_hybrid deepseek_v3 deepseek_v32 deepseek_v4 dots1 ernie4_5_moe exaone_moe glm4_moe glm4_moe_lite
glm_moe_dsa hy_v3 kimi_linear laguna lfm2_moe mimo_v2_flash minimax_m2 nemotron_h solar_open step3p7
"""
OTHERWISE = {
    **dict.fromkeys(BIASED.split(), "adds a correction bias to its scores, which its logits do not hold"),
    "deepseek_v2": "may choose by groups of experts",
    "jetmoe": "returns three tensors per layer, two of them of attention's router",
    "longcat_flash": "adds a correction bias, and its columns are real and identity experts",
    "mistral4": "may choose by groups of experts",
}
CAPTURE = "record the experts' own input with `moeplan trace capture`"


def read(path: Path, options: Options) -> tuple[Trace, list[str]]:
    """Experts by logit, highest first, with softmax weights over those chosen."""
    layers = _layers(_load(path), path)
    notes = [_chooses_highest(path, options)]
    if options.top_k is None:
        raise DocumentError(f"{path}: logits do not tell how many experts a token goes to: give --top-k")
    dense = [i for i, (_, value) in enumerate(layers) if value is None]
    kept = [i for i, (_, value) in enumerate(layers) if value is not None]
    if not kept or len(kept) > MAX_LAYERS:
        raise DocumentError(f"{path}: router logits of {len(kept)} layers, expected 1..{MAX_LAYERS}")
    if dense:
        notes.append(f"layers {ranges(dense)} without router logits: dropped")
    lengths, ids, weights = None, [], []
    shape: tuple[int, ...] = ()
    for i in kept:
        name, value = layers[i]
        logits = to_array(value, f"{path}: {name}", "f")
        if logits.ndim not in (2, 3) or 0 in logits.shape or logits.shape[-1] > MAX_EXPERTS:
            raise DocumentError(f"{path}: {name}: expected [tokens, experts], got {list(logits.shape)}")
        if shape and logits.shape != shape:
            raise DocumentError(f"{path}: {name}: {list(logits.shape)} beside {list(shape)}: layers must agree")
        shape = logits.shape
        if logits.ndim == 3:
            lengths = np.full(shape[0], shape[1])
        if i == kept[0]:
            rows = int(np.prod(shape[:-1]))
            limit_choices(rows, rows * len(kept) * options.top_k, str(path))
        chosen, gate = _choose(logits.reshape(-1, shape[-1]), options.top_k, f"{path}: {name}")
        ids.append(chosen)
        weights.append(gate)
    experts = shape[-1]
    agree("num-experts", experts, options.num_experts, str(path))
    agree("layers", len(layers), options.layers, str(path))
    agree_with_model(len(kept), options, str(path))
    trace = Trace.of(
        np.stack(ids, axis=1),
        experts,
        expert_weights=np.stack(weights, axis=1),
        seq_len=lengths,
        source=f"Transformers router logits{f'; model layers {ranges(kept)}' if dense else ''}",
        model=options.model_name,
        where=str(path),
    )
    notes.insert(0, f"per-token routing: {trace.tokens} tokens in {len(trace.seq_len)} sequences, top-{trace.top_k}")
    if lengths is None:
        notes.append("[tokens, experts] does not tell sequences: taken for one; padding tokens, if any, are counted")
    else:
        notes.append("padding tokens of the batch, if any, are counted")
    return trace, notes


def _chooses_highest(path: Path, options: Options) -> str:
    """What is known of the model's choice, as text; raises where logits do not tell it, by the family's name."""
    weighting = "weights a softmax over those chosen"
    model = options.model
    if model is not None:
        if model.family in OTHERWISE:
            raise DocumentError(
                f"{path}: logits of {model.family} do not tell its experts: it {OTHERWISE[model.family]}; {CAPTURE}"
            )
        if model.family not in HIGHEST.split():
            raise DocumentError(
                f"{path}: {model.family} is not known to take the experts of the highest logits: {CAPTURE}"
            )
        return f"experts by logit, as {model.family} chooses; {weighting}"
    if not options.highest_logits:
        raise DocumentError(
            f"{path}: router logits do not tell how the model chooses (a correction bias, groups): give --model, or "
            f"--highest-logits if it takes the highest; else {CAPTURE}"
        )
    return (
        f"experts by logit, {weighting}: models that choose otherwise (groups, a correction bias) need `moeplan trace "
        "capture`"
    )


def _load(file: Path) -> Any:
    if file.is_dir():
        raise DocumentError(f"{file}: give one file of router logits (.pt, .npz, .safetensors)")
    if file.suffix == ".npz":
        return read_npz(file)
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    return read_torch(file)


def _layers(content: Any, file: Path) -> list[tuple[str, Any]]:
    """Name and logits of each layer, in order."""
    if isinstance(content, dict) and "router_logits" in content:
        content = content["router_logits"]
    if isinstance(content, list | tuple):
        return [(f"layer {i}", value) for i, value in enumerate(content)]
    if isinstance(content, dict) and content and all(isinstance(name, str) for name in content):
        return [(show(name), content[name]) for name in sorted(content, key=natural)]
    raise DocumentError(f"{file}: expected a tensor per layer, such as tuple(output.router_logits)")


def _choose(logits: np.ndarray, top_k: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T, K] and weights [T, K] of the highest logits; of equal ones the lower expert."""
    if not 1 <= top_k <= logits.shape[1]:
        raise DocumentError(f"{where}: top-{top_k} of {logits.shape[1]} experts")
    with np.errstate(over="ignore"):
        logits = logits.astype(np.float32)
    if not np.isfinite(logits).all():
        raise DocumentError(f"{where}: logits must be finite")
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    top = np.take_along_axis(logits, ids, axis=1)
    weights = np.exp(top - top[:, :1])
    return ids.astype(np.int32), weights / weights.sum(axis=1, keepdims=True)

"""Router logits of a Transformers model (`output_router_logits=True`): per layer [tokens, E] or [batch, tokens, E].

`torch.save(tuple(output.router_logits), "logits.pt")`, or the layers as arrays of an npz or a safetensors file, which
are taken in the natural order of their names (layer_2 before layer_10).
"""

from pathlib import Path
from typing import Any

import numpy as np

from ....spec.document import show
from ....spec.errors import DocumentError
from ....spec.model import MAX_EXPERTS, MAX_LAYERS
from ....spec.trace import Trace
from .files import natural, read_npz, read_safetensors, read_torch, to_array
from .records import Options, agree, ranges


def read(path: Path, options: Options) -> tuple[Trace, list[str]]:
    """Experts by logit, highest first, with softmax weights over those chosen."""
    layers = _layers(_load(path), path)
    if options.top_k is None:
        raise DocumentError(f"{path}: logits do not tell how many experts a token goes to: give --top-k")
    notes: list[str] = []
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
        chosen, gate = _choose(logits.reshape(-1, shape[-1]), options.top_k, f"{path}: {name}")
        ids.append(chosen)
        weights.append(gate)
    experts = shape[-1]
    agree("num-experts", experts, options.num_experts, str(path))
    agree("layers", len(layers), options.layers, str(path))
    trace = Trace.of(
        np.stack(ids, axis=1),
        experts,
        expert_weights=np.stack(weights, axis=1),
        seq_len=lengths,
        source=f"Transformers router logits{f'; model layers {ranges(kept)}' if dense else ''}",
        where=str(path),
    )
    notes.insert(0, f"per-token routing: {trace.tokens} tokens in {len(trace.seq_len)} sequences, top-{trace.top_k}")
    notes.append(
        "experts by logit, weights a softmax over those chosen: models that choose otherwise (groups, a correction "
        "bias) need `moeplan trace capture`"
    )
    if lengths is None:
        notes.append("[tokens, experts] does not tell sequences: taken for one; padding tokens, if any, are counted")
    else:
        notes.append("padding tokens of the batch, if any, are counted")
    return trace, notes


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

"""Record how a Transformers mixture-of-experts model routes a text.

The routers of Transformers return ``(logits [T, E], gate weights [T, K], expert ids [T, K])``, each with its own
architecture's scoring (softmax or sigmoid, grouped or not, normalised or not, scaled or not). Forward hooks take what
the model really used, so nothing of it is computed again here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...spec import MoeplanError, Trace
from .hugging_face import import_transformers, load_model, locate, read_config, read_sequences

TOKENS_PER_CALL = 2048

Progress = Callable[[dict[str, Any]], None]


def capture(
    model: str | Path,
    text: str | Path,
    *,
    tokens: int = 8192,
    sequence_length: int = 128,
    seed: int = 0,
    random_weights: bool = False,
    device: str = "cpu",
    on_event: Progress | None = None,
) -> Trace:
    """Routing of ``tokens`` tokens of a text file, in sequences of ``sequence_length`` (the last may be shorter).

    model: a folder with config.json, safetensors and perhaps a tokenizer; or a config.json, with ``random_weights``.
    text: a text file, cut into sequences; ``seed`` chooses among them (and draws random weights).
    on_event: called with ``{"done": tokens, "of": tokens, "what": text}`` after every forward call.
    Layers of the trace are the model's layers with experts, in order of execution. Code that comes with a model is
    never run, and nothing is downloaded.
    Raises MoeplanError, among others for a router whose choice cannot be seen.
    """
    folder, config_path = locate(Path(model), random_weights)
    if tokens < 1 or sequence_length < 1:
        raise MoeplanError(f"capture of {tokens} tokens in sequences of {sequence_length}: both must be at least 1")
    transformers = import_transformers()
    config = read_config(transformers, config_path)
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and sequence_length > longest:
        raise MoeplanError(f"sequences of {sequence_length} tokens: {config_path} allows at most {longest}")
    sequences, tokenizer_name = read_sequences(transformers, folder, config, Path(text), tokens, sequence_length, seed)
    net = load_model(transformers, folder, config, config_path, random_weights, seed, device)
    ids, weights, experts = _record(net, sequences, device, on_event)
    origin = f"random weights, seed {seed}" if random_weights else "its own weights"
    return Trace.of(
        ids,
        experts,
        expert_weights=weights,
        seq_len=np.array([len(sequence) for sequence in sequences]),
        model=folder.resolve().name,
        source=f"moeplan trace capture: {config.model_type}, {origin}; {Path(text).name} as {tokenizer_name}",
        where=str(model),
    )


@torch.inference_mode()
def _record(
    net: torch.nn.Module, sequences: list[Tensor], device: str, on_event: Progress | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Expert ids and gate weights [T, L, K], highest weight first, and the number of experts."""
    backbone = getattr(net, "base_model", net)  # without the head: its logits would be large, and are not needed
    seen: list[tuple[str, object]] = []
    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: seen.append((name, output)))
        for name, module in net.named_modules()
        if _is_router(module)
    ]
    if not handles:
        raise MoeplanError(f"{type(net).__name__} has no router: give a mixture-of-experts model")
    total, done = sum(len(sequence) for sequence in sequences), 0
    parts: list[tuple[Tensor, Tensor]] = []
    experts: set[int] = set()
    try:
        for batch in _batches(sequences):
            seen.clear()
            backbone(input_ids=batch.to(device), use_cache=False)
            layers = [_routing(net, name, output, batch.numel()) for name, output in seen]
            experts.update(logits for _, _, logits in layers)
            if len(layers) != len(handles) or len({ids.shape for ids, _, _ in layers}) != 1 or len(experts) != 1:
                raise MoeplanError(
                    f"{type(net).__name__}: its {len(handles)} routers differ, or not each routed every token once"
                )
            parts.append((torch.stack([ids for ids, _, _ in layers], 1), torch.stack([w for _, w, _ in layers], 1)))
            done += batch.numel()
            if on_event:
                on_event({"done": done, "of": total, "what": f"{done} of {total} tokens"})
    finally:
        for handle in handles:
            handle.remove()
    ids, weights = (torch.cat(part) for part in zip(*parts, strict=True))
    order = weights.argsort(dim=2, descending=True, stable=True)
    return ids.gather(2, order).numpy(), weights.gather(2, order).numpy(), experts.pop()


def _is_router(module: torch.nn.Module) -> bool:
    """Transformers names them MixtralTopKRouter, DeepseekV3TopkRouter, JetMoeTopKGating, HunYuanMoEV1Gate, ..."""
    name = type(module).__name__
    return "Router" in name or name.endswith("TopKGating") or ("MoE" in name and name.endswith("Gate"))


def _batches(sequences: list[Tensor]) -> list[Tensor]:
    """Equal sequences together, at most about TOKENS_PER_CALL tokens in a call; a shorter last one alone."""
    full = [sequence for sequence in sequences if len(sequence) == len(sequences[0])]
    size = max(1, TOKENS_PER_CALL // len(full[0]))
    batches = [torch.stack(full[i : i + size]) for i in range(0, len(full), size)]
    return batches + [sequence[None] for sequence in sequences[len(full) :]]


def _routing(net: torch.nn.Module, name: str, output: object, tokens: int) -> tuple[Tensor, Tensor, int]:
    """Expert ids [T, K] int64, gate weights [T, K] float32 and the number of experts, from one router's output."""
    values = output if isinstance(output, tuple) else ()
    tensors = [t.reshape(-1, t.shape[-1]) for t in values if isinstance(t, Tensor) and t.ndim >= 2]
    ids = [t for t in tensors if not t.is_floating_point()]
    if len(ids) == 1 and len(ids[0]) == tokens:
        floats = [t for t in tensors if t.is_floating_point()]
        weights = [t for t in floats[1:] if t.shape == ids[0].shape]
        if len(weights) == 1 and len(floats[0]) == tokens:
            return ids[0].long().cpu(), weights[0].float().cpu(), floats[0].shape[1]
    raise MoeplanError(
        f"{type(net).__name__}: the router {name} does not return logits, gate weights and expert ids, "
        "so its choice cannot be seen: this architecture cannot be captured"
    )

"""Record how a Transformers mixture-of-experts model routes a text.

Every experts module of Transformers (``runtime.embedding.form``) is called with ``(hidden states [T, D], expert ids
[T, K], gate weights [T, K])``, whatever made the choice: softmax or sigmoid scores, groups, a correction bias, a table
of token ids. Hooks take these arguments, so nothing of the choice is computed again here. Router logits would not do: a
correction bias is no part of them, JetMoe's attention has routers too, and LongCat-Flash has columns for identity
experts.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...runtime.embedding.form import is_experts
from ...spec import MoeplanError, Trace
from .hugging_face import import_transformers, load_model, locate, read_config, read_sequences

TOKENS_PER_CALL = 2048
IDS = {"top_k_index", "router_indices", "selected_experts"}  # names of the second argument of an experts module
UNSEEN = {"zaya": "tokens that skip their experts are sent to expert 0 with no weight"}

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
    Layers of the trace are the model's layers with experts, in order of execution. Where tokens chose identity experts
    (LongCat-Flash), counts of the real ones remain. Code that comes with a model is never run, and nothing is
    downloaded.
    Raises MoeplanError, among others for a model whose choice cannot be seen.
    """
    folder, config_path = locate(Path(model), random_weights)
    if tokens < 1 or sequence_length < 1:
        raise MoeplanError(f"capture of {tokens} tokens in sequences of {sequence_length}: both must be at least 1")
    transformers = import_transformers()
    config = read_config(transformers, config_path)
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and sequence_length > longest:
        raise MoeplanError(f"sequences of {sequence_length} tokens: {config_path} allows at most {longest}")
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or 0)
    sequences, tokenizer_name = read_sequences(folder, vocabulary, Path(text), tokens, sequence_length, seed)
    net = load_model(transformers, folder, config, config_path, random_weights, seed, device)
    recording = _record(net, sequences, device, on_event)
    origin = f"random weights, seed {seed}" if random_weights else "its own weights"
    source = f"moeplan trace capture: {config.model_type}, {origin}; {Path(text).name} as {tokenizer_name}"
    name = folder.resolve().name
    if (recording.ids >= recording.experts).any():
        source += f"; {(recording.ids >= recording.experts).mean():.1%} of the choices, identity experts, not counted"
        return Trace.of_counts(recording.counts(), model=name, source=source, where=str(model))
    return Trace.of(
        recording.ids,
        recording.experts,
        expert_weights=recording.weights,
        seq_len=np.array([len(sequence) for sequence in sequences]),
        model=name,
        source=source,
        where=str(model),
    )


@dataclass(frozen=True)
class _Recording:
    """ids, weights: [T, L, K], highest gate weight first; ids from ``experts`` on are identity experts."""

    ids: np.ndarray
    weights: np.ndarray
    experts: int

    def counts(self) -> np.ndarray:
        """Choices of each real expert, [L, E]."""
        layers = range(self.ids.shape[1])
        return np.stack(
            [np.bincount(self.ids[:, j].ravel(), minlength=self.experts)[: self.experts] for j in layers]
        ).astype(float)


@torch.inference_mode()
def _record(net: torch.nn.Module, sequences: list[Tensor], device: str, on_event: Progress | None) -> _Recording:
    """What the experts of every layer were given."""
    backbone = getattr(net, "base_model", net)  # without the head: its logits would be large, and are not needed
    modules = _experts_modules(net)
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        module.register_forward_pre_hook(
            lambda _module, args, kwargs, name=name: seen.append(_choice(net, name, args, kwargs)), with_kwargs=True
        )
        for name, module in modules.items()
    ]
    total, done = sum(len(sequence) for sequence in sequences), 0
    parts: list[tuple[Tensor, Tensor]] = []
    try:
        for batch in _batches(sequences):
            seen.clear()
            backbone(input_ids=batch.to(device), use_cache=False)
            tokens = batch.numel()
            if len(seen) != len(modules) or len({ids.shape for ids, _ in seen}) != 1 or len(seen[0][0]) != tokens:
                raise MoeplanError(
                    f"{type(net).__name__}: its {len(modules)} routers differ, or not each routed every token once"
                )
            parts.append((torch.stack([ids for ids, _ in seen], 1), torch.stack([w for _, w in seen], 1)))
            done += tokens
            if on_event:
                on_event({"done": done, "of": total, "what": f"{done} of {total} tokens"})
    finally:
        for handle in handles:
            handle.remove()
    ids, weights = (torch.cat(part) for part in zip(*parts, strict=True))
    order = weights.argsort(dim=2, descending=True, stable=True)
    return _Recording(ids.gather(2, order).numpy(), weights.gather(2, order).numpy(), _real_experts(net, modules))


def _experts_modules(net: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules that are called with expert ids and gate weights; refuses, by name, a model with experts besides."""
    kind = getattr(getattr(net, "config", None), "model_type", "")
    modules, others = {}, set()
    for name, module in net.named_modules():
        if _takes_ids(module):
            modules[name] = module
        elif type(module).__name__.endswith("Experts") and "Shared" not in type(module).__name__:
            others.add(type(module).__name__)
    if others or kind in UNSEEN:
        reason = UNSEEN.get(kind, f"{', '.join(sorted(others))} does not take expert ids and gate weights")
        raise MoeplanError(
            f"{type(net).__name__}: {reason}, so its choice cannot be seen: this architecture cannot be captured"
        )
    if not modules:
        raise MoeplanError(f"{type(net).__name__} has no router: give a mixture-of-experts model")
    return modules


def _takes_ids(module: torch.nn.Module) -> bool:
    if is_experts(module):
        return True
    names = list(inspect.signature(module.forward).parameters)  # LongCat's are called so too
    return type(module).__name__.endswith("Experts") and len(names) == 3 and names[1] in IDS


def _choice(
    net: torch.nn.Module, name: str, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Tensor, Tensor]:
    """Expert ids [T, K] int64 and gate weights [T, K] float32 that an experts module was called with."""
    given = [*args[1:], *(value for key, value in kwargs.items() if key != "hidden_states")]
    tensors = [value.reshape(-1, value.shape[-1]) for value in given if isinstance(value, Tensor) and value.ndim >= 2]
    if len(tensors) == 2 and tensors[0].shape == tensors[1].shape:
        ids, weights = sorted(tensors, key=lambda tensor: tensor.is_floating_point())
        if weights.is_floating_point() and not ids.is_floating_point():
            return ids.long().cpu(), weights.float().cpu()
    raise MoeplanError(
        f"{type(net).__name__}: {name} was not called with expert ids and gate weights [tokens, top_k], so its choice "
        "cannot be seen: this architecture cannot be captured"
    )


def _real_experts(net: torch.nn.Module, modules: dict[str, torch.nn.Module]) -> int:
    """Experts that have weights: ids at or above them are identity experts."""
    counts = {
        getattr(module, "num_routed_experts", None) or getattr(module, "num_experts", None)
        for module in modules.values()
    }
    count = counts.pop() if len(counts) == 1 else None
    if not isinstance(count, int):
        raise MoeplanError(f"{type(net).__name__}: its layers have different numbers of experts, or do not tell them")
    return count


def _batches(sequences: list[Tensor]) -> list[Tensor]:
    """Equal sequences together, at most about TOKENS_PER_CALL tokens in a call; a shorter last one alone."""
    full = [sequence for sequence in sequences if len(sequence) == len(sequences[0])]
    size = max(1, TOKENS_PER_CALL // len(full[0]))
    batches = [torch.stack(full[i : i + size]) for i in range(0, len(full), size)]
    return batches + [sequence[None] for sequence in sequences[len(full) :]]

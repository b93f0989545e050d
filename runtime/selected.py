"""Decoding steps with a selection of experts beside steps without: their output and the experts that they use.

Letters: S sequences, E experts, K top-k, V vocabulary.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..spec import Model, MoeplanError, Plan
from ..spec.model import Gate
from ..spec.selection import Selection
from .coherent import CoherentExecutor
from .collectives import all_reduce
from .executor import Executor
from .groups import consecutive_group
from .router import Choice, Chooser, choose
from .selection import Selector

COMPARED_STEPS = 8  # decoding steps, one after the other, whose output is compared
PIECE = 128  # tokens of each sequence that are read at once


class Counting:
    """A chooser that counts which experts another one chooses: ``counts`` has [E] of every layer in the order of the
    calls."""

    def __init__(self, chooser: Chooser) -> None:
        self._chooser, self.counts = chooser, list[Tensor]()

    def __call__(self, logits: Tensor, gate: Gate, top_k: int, correction_bias: Tensor | None = None) -> Choice:
        ids, gates = self._chooser(logits, gate, top_k, correction_bias)
        self.counts.append(torch.bincount(ids.flatten(), minlength=logits.shape[1]))
        return ids, gates


class Selecting:
    """A selection under comparison on one rank, the sequences' context in the executor's cache.

    tokens: [S, COMPARED_STEPS], of a text one more, on the executor's device: what the steps take.
    """

    def __init__(self, executor: Executor, context: int, selector: Selector, tokens: Tensor, texts: bool) -> None:
        self.selector, self.tokens = selector, tokens
        self._executor, self._context, self._texts = executor, context, texts

    @classmethod
    def of(cls, plan: Plan, executor: Executor, select: str, prompts: list[list[int]] | None) -> "Selecting":
        """select: as the user typed it; prompts: [S, context + COMPARED_STEPS + 1] tokens of a text, or random ones
        after the context that is there. Every rank must call it at the same time."""
        selector, context = open_selector(Selection.from_text(select)), plan.workload.context
        if prompts is None:
            shape = (plan.workload.sequences, COMPARED_STEPS)
            drawn = torch.from_numpy(np.random.default_rng(plan.seed).integers(plan.model.vocab_size, size=shape))
            return cls(executor, context, selector, drawn.to(executor.device), False)
        tokens = torch.tensor(prompts, device=executor.device)
        read_context(executor, tokens[:, :context])
        return cls(executor, context, selector, tokens[:, context:], True)

    def compare(self) -> dict[str, Any]:
        """See ``compare_outputs``."""
        return compare_outputs(self._executor, self.tokens, self._context, self.selector, self._texts)


def open_selector(selection: Selection) -> Selector:
    """The selector of this rank; every rank must call it.

    Votes travel in a group of their own: they do not queue behind weights that are under way.
    """
    world = dist.get_world_size()
    if world == 1:
        return Selector(selection)
    group = consecutive_group(world)
    return Selector(selection, lambda votes: all_reduce(votes, group))


def read_context(executor: Executor, tokens: Tensor) -> None:
    """Fill the cache with tokens [S, length] of all sequences, on every rank, as the gates route them."""
    piece = 1 if isinstance(executor, CoherentExecutor) else PIECE
    for begin in range(0, tokens.shape[1], piece):
        part = tokens[:, begin : begin + piece]
        layout = executor.layout.of_length(part.shape[1])
        executor.step(part.reshape(-1)[layout.own], layout, begin)


def compare_outputs(
    executor: Executor, tokens: Tensor, context: int, selector: Selector, texts: bool
) -> dict[str, Any]:
    """The same decoding steps without and with ``selector`` after ``context`` tokens in the cache.

    tokens: [S, steps], of which every step takes one of each sequence; with ``texts`` there is one more, the last to be
    predicted. The selected steps read the keys and values that they wrote themselves. Result (JSON): ``divergence``,
    ``changed``, ``tokens``, ``perplexity`` and ``used``, distinct experts of each layer [before, after, experts], as
    ``SelectionReport`` has them.
    """
    layout, steps = executor.layout, tokens.shape[1] - texts
    outputs, used = [], []
    for chooser in (choose, selector):
        logits, counts = [], []
        for s in range(steps):
            counting = Counting(chooser)
            output = executor.step(tokens[layout.own, s], layout, context + s, chooser=counting)
            assert output.logits is not None
            logits.append(output.logits)
            counts.append(counting.counts)
        outputs.append(logits)
        used.append(distinct(counts))
    targets = [tokens[layout.own, s + 1] if texts else None for s in range(steps)]
    sums = torch.zeros(5, dtype=torch.float64, device=tokens.device)
    for exact, selected, target in zip(*outputs, targets, strict=True):
        sums += differences(exact, selected, target)
    divergence, changed, *surprise, count = all_reduce(sums).tolist()
    return {
        "divergence": divergence / count,
        "changed": changed / count,
        "tokens": int(count),
        "perplexity": [math.exp(nats / count) for nats in surprise] if texts else None,
        "used": [list(layer) for layer in zip(*used, experts_of(executor.model), strict=True)],
    }


def experts_of(model: Model) -> list[int]:
    """Experts of every mixture-of-experts layer."""
    return [block.moe.num_experts for block in model.layers if block.moe]


def differences(exact: Tensor, selected: Tensor, target: Tensor | None) -> Tensor:
    """[5] float64 sums over rows of logits [S, V]: divergence in nats, changed likeliest tokens, surprise in nats of
    the target [S] under both (0 without one), rows."""
    p, q = (logits.double().log_softmax(-1) for logits in (exact, selected))
    changed = (p.argmax(-1) != q.argmax(-1)).sum().double()
    surprise = [-x.gather(1, target[:, None]).sum() if target is not None else x.new_zeros(()) for x in (p, q)]
    return torch.stack([(p.exp() * (p - q)).sum(), changed, *surprise, p.new_tensor(len(p))])


def distinct(counts: list[list[Tensor]]) -> list[float]:
    """Experts with tokens on any device, by layer, mean over steps. counts: [steps][layers] of [E]."""
    sizes = [len(layer) for layer in counts[0]]
    together = all_reduce(torch.stack([torch.cat(step) for step in counts]))
    return [float((part > 0).sum(1).double().mean()) for part in together.split(sizes, dim=1)]


def check_prompts(model: Model, prompts: list[list[int]], sequences: int, length: int) -> None:
    """Raise MoeplanError unless there are ``sequences`` of ``length`` tokens of the vocabulary."""
    if len(prompts) != sequences or any(len(tokens) != length for tokens in prompts):
        raise MoeplanError(f"the text must give {sequences} sequences of {length} tokens")
    if not all(0 <= token < model.vocab_size for tokens in prompts for token in tokens):
        raise MoeplanError(f"the text has tokens outside {model.name}'s vocabulary of {model.vocab_size}")

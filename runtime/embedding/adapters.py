"""Experts that their block calls by itself, brought to Transformers' experts interface: Llama-4's.

Its block scales a token by its gate, gives it to every expert (zeros where it was not chosen), and adds all outputs.
With one expert per token, as in all published models, that is the chosen expert's output of the scaled token: the
interface's, with gate 1. With more each expert would get another token, which the interface does not have.

T tokens, E experts, K top-k (1), D model.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ...spec.errors import MoeplanError

BLOCKS = {"Llama4TextMoe": "Llama-4"}
"""Classes of blocks that call their experts with every token, and their family's name."""
SAID = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": True,
    "is_concatenated": True,
    "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}
"""What the experts modules of such blocks would say about themselves."""


def describe(net: nn.Module) -> None:
    """Have the experts of such blocks say how they keep their tensors; what they compute stays as it is.

    Raises MoeplanError, naming the block, for several experts per token.
    """
    for name, block in _blocks(net):
        if block.top_k != 1:
            raise MoeplanError(
                f"{name}: {block.top_k} experts per token, each given the token scaled by its own gate "
                f"({BLOCKS[type(block).__name__]}): only one expert per token can be carried"
            )
        experts = block.experts
        for key, value in SAID.items():
            setattr(experts, key, value)
        experts.config = block.shared_expert.config
        experts._apply_gate = partial(_apply_gate, experts.act_fn)


def adapt(net: nn.Module) -> None:
    """After ``describe``: have such blocks call their experts with [T, D] tokens, [T, 1] ids and [T, 1] gates."""
    for _, block in _blocks(net):
        block.experts.forward = partial(_through_interface, block.experts)
        block.forward = MethodType(_block, block)


def calls_all(experts: nn.Module) -> bool:
    """Whether these are called by a block that was not adapted: with [E T, D] tokens for every expert."""
    return type(experts).__name__ == "Llama4TextExperts" and "forward" not in vars(experts)


def for_experts(routed: Tensor, ids: Tensor, experts: int) -> Tensor:
    """The argument [E T, D] of such experts with the tokens given to others: ids [T, 1]."""
    scaled = routed.view(experts, -1, routed.shape[-1]).sum(0)  # of all copies of a token one is not zero
    tokens = torch.arange(len(scaled), device=ids.device)
    given = scaled.new_zeros((experts, *scaled.shape))
    given[ids.flatten(), tokens] = scaled
    return given.view(routed.shape)


@contextmanager
def silent(experts: Iterable[nn.Module]) -> Iterator[None]:
    """Within it those of these modules that ``calls_all`` give zeros."""
    chosen = [module for module in experts if calls_all(module)]
    for module in chosen:
        module.forward = torch.zeros_like
    try:
        yield
    finally:
        for module in chosen:
            del module.forward


def _blocks(net: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in net.named_modules():
        if type(module).__name__ in BLOCKS:
            yield name, module


def _block(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """The block's own forward, with one expert for each token instead of all."""
    hidden = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden)
    ids = torch.topk(logits, self.top_k, dim=1).indices  # as the router itself chose
    gates = scores.gather(1, ids)
    out = self.shared_expert(hidden)
    return out.add_(self.experts(hidden * gates, ids, torch.ones_like(gates))), logits


def _through_interface(experts: Any, hidden: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

    chosen = experts.config._experts_implementation
    compute = ALL_EXPERTS_FUNCTIONS.get_interface(chosen, grouped_mm_experts_forward)
    result: Tensor = compute(experts, hidden, ids, gates)
    return result


def _apply_gate(act: Any, gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gated: Tensor = act(gate) * up
    return gated

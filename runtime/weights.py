"""Weights of one layer as the runtime uses them, and the interface of their sources.

Letters: D model, E experts held here, H ffn columns held here, M 2 for a gated FFN ([0] gate, [1] up) or 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..spec import Model, MoeplanError
from ..spec.executed import check_executed
from ..spec.model import Attention

Range = tuple[int, int]  # [first, last)


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """Norm and projections of the query heads ``heads`` (and the key/value heads that they read).

    norm: [D]; qkv: [(heads + 2 * kv_heads) * head_dim, D], queries first; qkv_bias: its rows, or None;
    q_norm, k_norm: [head_dim] (qk_norm "head"), [heads * head_dim] and [kv_heads * head_dim] ("full"), or None;
    out: [D, heads * head_dim]; out_bias: [D], only where head 0 is held, so that partial outputs add up.
    """

    spec: Attention
    eps: float
    heads: Range
    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None


@dataclass(frozen=True, eq=False)
class RouterWeights:
    """norm: [D], applied before the router and the experts; weight: [experts, D]; biases: [experts] or None; experts:
    all that the router chooses among, identity experts included and last.

    noise: [experts, D] of a noisy gate. Of a cosine gate projection: [R, D], temperature: [1], weight: [experts, R].
    """

    eps: float
    norm: Tensor
    weight: Tensor
    bias: Tensor | None
    correction_bias: Tensor | None
    noise: Tensor | None = None
    projection: Tensor | None = None
    temperature: Tensor | None = None


@dataclass(frozen=True, eq=False)
class DenseWeights:
    """A dense FFN or a shared expert: gate_up [M, H, D], down [D, H].

    norm: [D] of a dense layer, None for a shared expert (it reads what the router normalised).
    gate: [1, D] of a shared expert weighed by a sigmoid, else None.
    """

    activation: str
    eps: float
    norm: Tensor | None
    gate_up: Tensor
    down: Tensor
    gate: Tensor | None


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer on one device; what the layer does not have is None.

    gate_up: [E, M, H, D] and down: [E, D, H] of the held experts, in the order asked for.
    """

    attention: AttentionWeights | None
    router: RouterWeights | None
    gate_up: Tensor | None
    down: Tensor | None
    shared: DenseWeights | None
    dense: DenseWeights | None


class WeightSource(Protocol):
    """Where weights come from; every call returns tensors on the source's device, in its dtype."""

    model: Model

    def layer(
        self,
        index: int,
        *,
        experts: Sequence[int] | None = None,
        columns: Range | None = None,
        heads: Range | None = None,
    ) -> LayerWeights:
        """One layer's weights: these experts in this order, these FFN columns of each, these query heads.

        None means all. ``experts=[]`` or an empty column range gives empty tensors.
        """
        ...

    def experts(self, index: int, experts: Sequence[int], columns: Range) -> tuple[Tensor, Tensor]:
        """gate_up [E, M, H, D] and down [E, D, H] of these experts of a layer, and these FFN columns of each."""
        ...

    def embedding(self) -> Tensor:
        """[V, D]"""
        ...

    def head(self) -> Tensor:
        """[V, D]; the embedding where the model ties them."""
        ...

    def final_norm(self) -> Tensor:
        """[D]"""
        ...


def kv_range(attention: Attention, heads: Range) -> Range:
    """Key/value heads that the query heads ``heads`` read.

    Raises MoeplanError where the heads do not divide evenly.
    """
    first, last = (h * attention.kv_heads for h in heads)
    if first % attention.heads or last % attention.heads:
        raise MoeplanError(
            f"attention heads {heads[0]}..{heads[1]} of {attention.heads} do not divide {attention.kv_heads} key/value "
            "heads evenly: use a lower tensor-parallel degree"
        )
    return first // attention.heads, last // attention.heads


def check_supported(model: Model) -> None:
    """Raise MoeplanError naming the first thing of ``model`` that the runtime does not execute."""
    check_executed(model)

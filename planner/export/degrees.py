"""Parallel degrees that an engine accepts for a model: it stops at a degree which does not divide heads or matrices.

Attention is split between fewer ranks than the experts where the ranks do not divide its heads; every rank of expert
parallelism then belongs to one of several data-parallel groups of attention.
"""

from collections.abc import Iterator

from ...spec.model import Attention, Block, Model
from .common import Target

VOCABULARY_PADDING = 64  # rows to which vLLM pads an embedding before it divides it


def attention_degree(target: Target, *, matrices: bool) -> int:
    """The largest degree of tensor parallelism that divides the ranks and that the model's attention can be split by.

    Query heads divide evenly; key-value heads divide, or are copied evenly (SGLang and vLLM demand both). matrices:
    dense and shared FFNs and the padded vocabulary are split by the same degree, as in vLLM.
    """
    return next(
        t for t in range(target.ranks, 0, -1) if target.ranks % t == 0 and fits(target.model, t, matrices=matrices)
    )


def undivided(target: Target) -> int | None:
    """The size of a dense FFN that the ranks do not divide, None if there is none."""
    sizes = (block.dense.ffn_size for block in target.model.blocks if block.dense)
    return next((size for size in sizes if size % target.ranks), None)


def why_not(target: Target) -> str:
    """What the ranks do not divide, as text: the first rule that a degree as large as the ranks breaks."""
    for block in target.model.blocks:
        attention = block.attention
        if attention and attention.heads % target.ranks:
            return f"{attention.heads} attention heads"
        if attention and not _heads_divide(attention, target.ranks):
            return f"{attention.kv_heads} key-value heads"
    return "all matrices of the model"


def fits(model: Model, degree: int, *, matrices: bool) -> bool:
    """Whether the model's attention, and with ``matrices`` its FFNs and vocabulary, can be split by this degree."""
    sizes = list(_matrices(model)) if matrices else []
    return all(_heads_divide(block.attention, degree) for block in model.blocks if block.attention) and all(
        size % degree == 0 for size in sizes
    )


def _heads_divide(attention: Attention, degree: int) -> bool:
    if attention.heads % degree:
        return False
    # Latent attention has one compressed key-value head, which every rank holds.
    shared = attention.kind == "mla" or attention.kv_heads % degree == 0
    return shared or (attention.kv_heads < degree and degree % attention.kv_heads == 0)


def _matrices(model: Model) -> Iterator[int]:
    """Sizes that vLLM divides by the tensor-parallel degree beside the heads."""
    yield -(-model.vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING
    for block in model.blocks:
        yield from _ffns(block)


def _ffns(block: Block) -> Iterator[int]:
    if block.dense:
        yield block.dense.ffn_size
    if block.moe and block.moe.shared_ffn_size:
        yield block.moe.shared_ffn_size

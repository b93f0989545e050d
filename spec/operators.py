"""The vocabulary that the profiler, the planner and the runtime share: operators, collectives and parts.

An operator is a function of the runtime that one device runs by itself. The profiler times that very function over
its axes; the planner reads the curve at the token counts of a plan. The shape says which curve: two calls with one
shape differ only along the axes.
"""

from typing import Literal, NamedTuple

from .model import Block, Model

Part = Literal[
    "embed",
    "attention",
    "mixer",
    "route",
    "dispatch",
    "gather",
    "expert",
    "shared",
    "combine",
    "dense",
    "head",
]
PARTS: tuple[Part, ...] = Part.__args__  # type: ignore[attr-defined]

Collective = Literal["all_to_all", "all_gather", "reduce_scatter", "all_reduce"]
COLLECTIVES: tuple[Collective, ...] = Collective.__args__  # type: ignore[attr-defined]


class Operator(NamedTuple):
    """What is timed: axes (in the order of the curve), and what one call does."""

    axes: tuple[str, ...]
    does: str


OPERATORS: dict[str, Operator] = {
    "attention_prefill": Operator(
        ("sequences", "length"), "norm, QKV, rotary, causal attention, output projection, residual; writes the cache"
    ),
    "attention_decode": Operator(
        ("sequences", "context"), "the same for one new token per sequence with `context` tokens in the cache"
    ),
    "attention_scattered": Operator(
        ("sequences", "context"), "decode for sequences no two of which lie side by side in the cache"
    ),
    "route": Operator(("tokens",), "norm, router, top-k, gate weights"),
    "expert_ffn": Operator(
        ("ffn", "experts", "tokens"),
        "the grouped FFN of one device: `experts` active experts, each with `tokens` rows, `ffn` columns of each",
    ),
    "dense_ffn": Operator(("tokens",), "norm, dense (or shared-expert) FFN, residual"),
    "ep_pack": Operator(("tokens",), "ep: de-duplicated send buffer and its counts from the routing"),
    "ep_unpack": Operator(("tokens",), "ep: received rows split into activations, expert ids and gate weights"),
    "by_batch": Operator(
        ("copied",), "ep, shares by batch: the tables for a batch's counts, with `copied` experts on two devices each"
    ),
    "ep_combine": Operator(("tokens",), "ep: returned partial rows added up at their tokens, residual"),
    "hierarchical_pack": Operator(("tokens",), "hierarchical: send buffer, one row per token and host, and the counts"),
    "hierarchical_relay": Operator(
        ("tokens",), "hierarchical: of `tokens` rows that arrived a copy for each device of the host with their experts"
    ),
    "hierarchical_add": Operator(
        ("tokens",), "hierarchical: partial rows of a host's devices added up for the `tokens` rows that arrived"
    ),
    "hierarchical_combine": Operator(("tokens",), "hierarchical: the hosts' rows added up at their tokens, residual"),
    "sharded_pack": Operator(("tokens",), "sharded: rows with their expert ids and gate weights in one buffer"),
    "sharded_unpack": Operator(("tokens",), "sharded: all devices' rows split again (`tokens` counts all of them)"),
    "sharded_combine": Operator(("tokens",), "sharded: the devices' partial rows summed, residual"),
    "gathered_combine": Operator(("tokens",), "gathered: residual"),
    "coherent_pack": Operator(("tokens",), "coherent: as ep_pack, with the tokens' numbers"),
    "coherent_unpack": Operator(("tokens",), "coherent: received rows split and normalised; which of them stay here"),
    "coherent_combine": Operator(
        ("tokens",), "coherent: of `tokens` rows, what goes on is selected, what stays is added up"
    ),
    "coherent_home": Operator(("tokens",), "coherent: rows for the tokens' own devices packed, and put in order there"),
    "coherent_cache": Operator(
        ("tokens",), "coherent: new keys and values packed, and those of all devices, `tokens` rows, written"
    ),
    "offload_order": Operator(
        ("tokens",), "offload: the choices of `tokens` tokens counted for devices, of received rows ordered by expert"
    ),
    "offload_visit": Operator(
        ("tokens",), "offload: `tokens` rows of one expert selected, and its outputs added to the sum"
    ),
    "offload_host": Operator(
        ("tokens",), "offload: `tokens` rows copied to a GPU's host, computed there by one expert, and copied back"
    ),
    "mixer_prefill": Operator(
        ("sequences", "length"), "a layer of Transformers' own modules without its routed experts; writes the cache"
    ),
    "mixer_decode": Operator(
        ("sequences", "context"), "the same for one new token per sequence with `context` tokens in the cache"
    ),
    "frame_prefill": Operator(
        ("sequences", "length"), "Transformers' model around its layers: embedding, positions, masks, final norm"
    ),
    "frame_decode": Operator(("sequences", "context"), "the same for one new token per sequence"),
    "embed": Operator(("tokens",), "token embedding"),
    "head": Operator(("tokens",), "final norm and output projection of `tokens` rows"),
}

OF_FAMILIES = ("mixer_prefill", "mixer_decode", "frame_prefill", "frame_decode")
"""Operators of models that only Transformers computes."""

Shape = dict[str, int | str]


def attention_shape(block: Block, tensor_parallel: int = 1) -> Shape:
    """Shape of the attention operators with the heads divided over ``tensor_parallel`` devices.

    Layers with a window and without one are timed apart.
    """
    a = block.attention
    assert a is not None
    window: Shape = {} if a.sliding_window is None else {"window": a.sliding_window}
    return {
        "hidden": block.hidden_size,
        "heads": a.heads // tensor_parallel,
        "kv_heads": a.kv_heads // tensor_parallel,
        "head_dim": a.head_dim,
        "qk_norm": a.qk_norm,
    } | window


def mixer_shape(block: Block) -> Shape:
    """Shape of ``mixer_*``: layers of one signature do the same with other weights."""
    c = block.counted
    assert c is not None
    return {"hidden": block.hidden_size, "layer": c.made_of, "kind": c.kind, "signature": c.signature}


def frame_shape(model: Model) -> Shape:
    """Shape of ``frame_*``."""
    layers = len(model.layers)
    return {
        "hidden": model.layers[0].hidden_size,
        "vocabulary": model.vocab_size,
        "family": model.family,
        "layers": layers,
    }


def route_shape(block: Block) -> Shape:
    """Shape of ``route``; gates that take the same products are timed alike, cosine gates by their rank.

    experts: all that the router has outputs for.
    """
    m = block.moe
    assert m is not None
    projected: Shape = {} if m.gate.rank is None else {"rank": m.gate.rank}
    return {"hidden": block.hidden_size, "experts": m.router_outputs, "top_k": m.top_k} | projected


def expert_shape(block: Block) -> Shape:
    """Shape of ``expert_ffn``, whose axis are the FFN columns that a device holds, and of ``offload_host``."""
    m = block.moe
    assert m is not None
    of: Shape = {"experts": block.counted.experts} if block.counted else {}
    return {"hidden": block.hidden_size, "ffn": m.ffn_size, "matrices": 3 if m.gated else 2} | of


def dense_shape(block: Block, ffn_size: int, gated: bool) -> Shape:
    return {"hidden": block.hidden_size, "ffn": ffn_size, "matrices": 3 if gated else 2}


def exchange_shape(block: Block, devices: int) -> Shape:
    """Shape of every ``ep_*``, ``sharded_*``, ``gathered_*``, ``offload_*`` and ``coherent_*`` operator but
    ``coherent_cache`` and ``offload_host``."""
    m = block.moe
    assert m is not None
    # Of a token's choices of identity experts nothing is packed, so that their share counts.
    some: Shape = {"experts": m.num_experts, "zero_experts": m.zero_experts} if m.zero_experts else {}
    return {"hidden": block.hidden_size, "top_k": m.top_k, "devices": devices} | some


def batch_shape(block: Block, devices: int) -> Shape:
    """Shape of ``by_batch``."""
    m = block.moe
    assert m is not None
    return {"experts": m.num_experts, "devices": devices}


def levels_shape(block: Block, devices: int, hosts: int) -> Shape:
    """Shape of every ``hierarchical_*`` operator."""
    return exchange_shape(block, devices) | {"hosts": hosts}


def cache_shape(block: Block, devices: int) -> Shape:
    """Shape of ``coherent_cache``: keys and values of one token in one layer."""
    a = block.attention
    assert a is not None
    return {"kv_heads": a.kv_heads, "head_dim": a.head_dim, "devices": devices}


def vocabulary_shape(model: Model) -> Shape:
    """Shape of ``embed`` and ``head``."""
    return {"hidden": model.layers[-1].hidden_size, "vocabulary": model.vocab_size}


def row_bytes(block: Block, element_bytes: int) -> int:
    """Bytes of one dispatched row: the activation, then top-k expert ids (int32) and gate weights (float32)."""
    m = block.moe
    assert m is not None
    return block.hidden_size * element_bytes + 8 * m.top_k


NUMBER_BYTES = 4
"""Bytes that rows of ``coherent`` have besides: the token's number, or its place in the cache (int32)."""


def cache_row_bytes(block: Block, element_bytes: int) -> int:
    """Bytes of one token's new keys and values of one layer, and of their place."""
    a = block.attention
    assert a is not None
    return a.cache_values() * element_bytes + NUMBER_BYTES

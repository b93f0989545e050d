"""Bytes on each device, as the runtime allocates them.

weights      embedding, head and final norm; of every stored layer its norms, attention (heads divided over the tensor
             group), router, shared experts or dense FFN, and the device's experts or FFN columns; tables by which
             needs are foreseen
gathered     one region for all experts of one layer, where any layer is gathered; where layers are offload, the places
             for experts that are read
cache        keys and values of the group's sequences (of all, where layers are coherent) and the device's heads, for
             every layer (never shared); of layers that Transformers computes what its cache holds
activations  the largest sum of buffers alive at once in any layer, or in the head

Letters: T tokens, D model, V vocabulary, K top-k, H ffn columns, M matrices into the FFN (2 gated, 1 plain).
"""

from collections.abc import Sequence

import numpy as np

from ..spec.model import Block
from ..spec.plan import DeviceMemory, LayerPlan
from .choices import held
from .layout import Layout
from .strategies.ep import COUNT_BYTES
from .strategies.layer import Layer

STATE_BYTES = 4  # of a value of a mixer's state


def replicated_weights(blocks: Sequence[Block], vocabulary: int, tied: bool, tensor: int, element_bytes: int) -> int:
    """Everything but routed experts, for these stored layers."""
    values = vocabulary * blocks[0].hidden_size * (1 if tied else 2) + blocks[-1].hidden_size if vocabulary else 0
    for block in blocks:
        attention = block.attention.parameters(block.hidden_size) if block.attention else 0
        values += block.always_on_parameters() - attention + -(-attention // tensor)
    return values * element_bytes


def expert_weights(block: Block, plan: LayerPlan, element_bytes: int) -> np.ndarray:
    """[devices] bytes of the routed experts (or of their columns) that each device stores for one layer."""
    moe = block.moe
    assert moe is not None
    expert = moe.expert_parameters(block.hidden_size) * element_bytes
    if plan.split is not None:
        return np.array([moe.num_experts * -(-expert * columns // moe.ffn_size) for columns in plan.split])
    return held(plan) * expert


def foresight_tables(plans: Sequence[LayerPlan], block: Block) -> np.ndarray:
    """[devices] bytes of the tables by which an ``offload`` plan foresees what is needed of what rests, one per layer;
    and of one table's part that is looked at, with its logarithms in f64."""
    assert block.moe is not None
    resting = np.array([np.array([len(experts) for experts in plan.slots]) - held(plan) for plan in plans[1:]])
    return block.moe.num_experts * (resting.sum(0) + (1 + 8) * resting.max(0))


def gathered_region(block: Block, plan: LayerPlan, element_bytes: int) -> int:
    moe = block.moe
    assert moe is not None
    whole = moe.num_experts * moe.expert_parameters(block.hidden_size) * element_bytes
    return whole if plan.strategy == "gathered" else 0


def cache(blocks: Sequence[Block], layout: Layout, element_bytes: int, replicated: bool = False) -> np.ndarray:
    """[devices] bytes of keys and values, over all layers; replicated: every device keeps those of all sequences."""
    positions = layout.workload.context + layout.workload.length
    values = sum(block.attention.cache_values() for block in blocks if block.attention)
    per_sequence = -(-values // layout.tensor) * positions * element_bytes
    for counted in (block.counted for block in blocks if block.counted):
        per_sequence += counted.held_values * positions * element_bytes + counted.state_values * STATE_BYTES
    if replicated:
        return np.full(layout.devices, layout.workload.sequences * per_sequence)
    return np.repeat(layout.sequences, layout.tensor) * per_sequence


def outside_activations(blocks: Sequence[Block], vocabulary: int, layout: Layout, element_bytes: int) -> np.ndarray:
    """[devices] largest of: attention of any layer, dense FFN, logits.

    Attention: the group's tokens, normalised, their Q, K, V before and after rotation, the heads' outputs, projected.
    """
    tokens = np.array(layout.tokens)
    together = np.repeat(layout.sequences, layout.tensor) * layout.workload.length
    peak = np.zeros(layout.devices)
    for block in dict.fromkeys(blocks):
        a, d = block.attention, block.dense
        if a is not None:
            heads = (3 * a.heads + 4 * a.kv_heads) * a.head_dim / layout.tensor
            peak = np.maximum(peak, together * (3 * block.hidden_size + heads))
        if block.counted is not None:
            peak = np.maximum(peak, together * (3 * block.hidden_size + block.counted.widths))
            if block.counted.peak is not None:
                each = block.counted.peak.values(layout.workload.length, layout.workload.context)
                peak = np.maximum(peak, np.repeat(layout.sequences, layout.tensor) * each)
        if d is not None:
            peak = np.maximum(peak, tokens * (2 * block.hidden_size + (2 + d.gated) * d.ffn_size))
    hidden = blocks[-1].hidden_size
    peak = np.maximum(peak, np.array(layout.last_counts) * (vocabulary + 2 * hidden))
    return np.ceil((peak + tokens * hidden) * element_bytes).astype(np.int64)


def layer_activations(layer: Layer, plans: Sequence[LayerPlan]) -> np.ndarray:
    """[B, devices] buffers of the experts of B layers under plans of one strategy: rows sent and received (by
    ``hierarchical`` in both levels), f32 sums, the largest expert's intermediate.

    The f32 sum is replaced, not changed, by each expert, so that two of it are alive.
    """
    moe, D, element = layer.moe, layer.block.hidden_size, layer.costs.element_bytes
    own, n = layer.tokens, layer.layout.devices
    row, matrices = layer.row_bytes, 2 if moe.gated else 1
    columns: np.ndarray | int = moe.ffn_size
    if plans[0].strategy in ("ep", "offload"):
        sent = layer.choices.dispatch(plans)
        largest, computed = sent.experts.largest, sent.computed
        buffers = sent.sent * row + 2 * computed * row + (computed + sent.sent) * D * element
        if plans[0].strategy == "offload":  # the sum of all experts beside one expert's rows, outputs and f32 sums
            buffers = buffers + 4 * D * computed + largest * (2 * row + (4 + element) * D)
            told = 1 + moe.num_experts + np.array([[max(map(len, plan.slots))] for plan in plans])
            buffers = buffers + 2 * COUNT_BYTES * n * told  # what devices tell each other
        summed = np.maximum(computed, own)
    elif plans[0].strategy == "hierarchical":
        forward = layer.choices.forward(plans)
        arrived, passed = forward.arrived, forward.passed
        largest, computed = forward.experts.largest, forward.computed
        buffers = (forward.sent + arrived + passed + 2 * computed) * row
        buffers = buffers + (computed + passed + arrived + forward.sent) * D * element
        summed = np.maximum(np.maximum(computed, arrived), own)
    elif plans[0].strategy == "sharded":
        largest, computed = layer.choices.total.max(1, keepdims=True), own.sum()
        columns = np.array([plan.split for plan in plans])
        buffers = own * row + 2 * computed * row + (computed + n * own) * D * element
        summed = np.maximum(computed, own)
    else:
        largest, summed = layer.choices.own.largest, own
        buffers = own * D * element
    intermediate = largest * (2 * D + (matrices + 1) * columns) * element
    shared = own * (2 * D + 3 * moe.shared_ffn_size) * element
    sums = 2 * 4 * D * summed
    # the residual stream and the normalised tokens; with identity experts' part, the stream with it too
    resident = (3 if moe.zero_experts else 2) * own * D * element
    beside = np.zeros(layer.layout.devices, np.int64)
    if layer.block.shortcut != "none":  # while tokens travel, the backbone has its own buffers
        backbone = [layer.block, *([layer.before.block] if layer.before else [])]
        beside = outside_activations(backbone, 0, layer.layout, element)
    return np.ceil(resident + buffers + sums + np.maximum(intermediate, shared)).astype(np.int64) + beside


def total(
    kept: np.ndarray, weights: np.ndarray, regions: np.ndarray, limits: Sequence[int]
) -> tuple[DeviceMemory, ...]:
    """Memory of a whole step; kept: [devices] the cache; weights: [devices], all of them; regions: [2, devices], for
    gathered weights and for activations."""
    return tuple(
        DeviceMemory(weights=int(w), gathered=int(region), cache=int(c), activations=int(a), limit=limit)
        for w, region, c, a, limit in zip(weights, *regions[:1], kept, regions[1], limits, strict=True)
    )

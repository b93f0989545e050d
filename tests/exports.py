"""Placements and small models for the exporters' tests."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from moeplan.spec.model import Attention, Block, Dense, Gate, Model, Moe
from moeplan.spec.placement import Placement, PlacementDevice, PlacementLayer, PlacementSolver, TraceSource


def small_model(experts: int, layers: int, dense: int = 1, groups: int = 1, family: str = "qwen3_moe") -> Model:
    """``dense`` dense layers, then ``layers`` with experts; 2, 3 and 4 ranks divide everything."""
    attention = Attention(heads=12, kv_heads=12, head_dim=4)
    moe = Moe(num_experts=experts, top_k=1, ffn_size=4, gate=Gate(groups=groups, top_groups=1))
    blocks = [Block(count=layers, hidden_size=4, attention=attention, moe=moe)]
    if dense:
        blocks.insert(0, Block(count=dense, hidden_size=4, attention=attention, dense=Dense(ffn_size=12)))
    return Model(name="small", family=family, vocab_size=192, blocks=tuple(blocks))


def placement_of(slots: Iterable[Any], experts: int, hosts: int = 1, **fields: object) -> Placement:
    """slots: [layers][devices][slots] experts; or PlacementLayers."""
    layers = [s if isinstance(s, PlacementLayer) else PlacementLayer(slots=tuple(map(tuple, s))) for s in slots]
    devices = len(layers[0].slots)
    capacity = max(len(experts) for layer in layers for experts in layer.slots)
    given: dict[str, object] = {
        "num_experts": experts,
        "devices": tuple(
            PlacementDevice(host=f"host{d * hosts // devices}", capacity=capacity) for d in range(devices)
        ),
        "layers": tuple(layers),
        "objective": "balance",
        "movement": "ep",
        "solver": PlacementSolver(status="feasible", objective=1, bound=1, gap=0, seconds=0, minimised="balance"),
        "scores": {},
        "trace": TraceSource(),
    }
    return Placement(**(given | fields))


def random_placement(seed: int, experts: int, devices: int, size: int, layers: int) -> Placement:
    """``size`` slots on every device: every expert once, then copies at random, none twice on a device."""
    rng = np.random.default_rng(seed)
    slots = []
    for _ in range(layers):
        order = rng.permutation(experts)
        held = [[int(e) for e in order[d::devices]] for d in range(devices)]
        for rank in held:
            others = [e for e in range(experts) if e not in rank]
            rank += [int(e) for e in rng.permutation(others)[: size - len(rank)]]
            rng.shuffle(rank)
        slots.append(held)
    return placement_of(slots, experts)


def as_groups(model: Model) -> Model:
    """The same model, whose router takes the experts in two groups."""
    blocks = [
        b.model_copy(update={"moe": b.moe.model_copy(update={"gate": Gate(groups=2, top_groups=1)})}) if b.moe else b
        for b in model.blocks
    ]
    return model.model_copy(update={"blocks": tuple(blocks)})


def linear_placement(model: Model, devices: int) -> Placement:
    moe = model.moe_block().moe
    assert moe is not None
    rows = np.arange(moe.num_experts).reshape(devices, -1).tolist()
    return placement_of([rows] * len(model.moe_layers), moe.num_experts)

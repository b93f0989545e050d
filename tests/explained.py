"""Small placements made by hand or at random, to be explained and compared."""

import numpy as np

from moeplan.spec.placement import (
    Placement,
    PlacementDevice,
    PlacementLayer,
    PlacementSolver,
    TraceSource,
)
from moeplan.spec.trace import Trace


def placement_of(slots: list[list[list[int]]], hosts: tuple[str, ...], trace: Trace | None = None, **fields: object):
    """slots: [layers][devices][experts]."""
    shares = fields.pop("shares", None)
    capacity = [max(len(layer[d]) for layer in slots) for d in range(len(hosts))]
    speed = fields.pop("speed", [1.0] * len(hosts))
    layers = [
        PlacementLayer(slots=tuple(map(tuple, layer)), shares=None if shares is None else shares[i])
        for i, layer in enumerate(slots)
    ]
    values: dict[str, object] = {
        "num_experts": 1 + max(e for device in slots[0] for e in device),
        "devices": [
            PlacementDevice(host=h, capacity=c, speed=s) for h, c, s in zip(hosts, capacity, speed, strict=True)
        ],
        "layers": layers,
        "objective": "locality",
        "movement": "coherent",
        "solver": PlacementSolver(
            status="feasible", objective=0.5, bound=0.4, gap=0.2, seconds=1, minimised="moves", bounds={"spectral": 0.4}
        ),
        "scores": {},
        "trace": TraceSource(digest=trace.digest() if trace else "", fit=(0.0, 1.0)),
    }
    return Placement(**(values | fields))


def random_placement(seed: int, layers: int, experts: int, devices: int, hosts: int, copies: int = 0) -> Placement:
    """Single copies at random, as many on each device; then ``copies`` more per layer where they fit."""
    rng = np.random.default_rng(seed)
    slots = []
    for _ in range(layers):
        held = [part.tolist() for part in np.array_split(rng.permutation(experts), devices)]
        for _ in range(copies):
            device, expert = int(rng.integers(devices)), int(rng.integers(experts))
            if expert not in held[device]:
                held[device].append(expert)
        slots.append(held)
    return placement_of(slots, tuple(f"host{d * hosts // devices}" for d in range(devices)))


def random_trace(seed: int, layers: int, experts: int, tokens: int = 200, top_k: int = 2) -> Trace:
    rng = np.random.default_rng(seed)
    gumbel = rng.gumbel(size=(tokens, layers, experts)) + rng.normal(size=(layers, experts))
    return Trace.of(np.argsort(-gumbel, axis=2)[:, :, :top_k], experts)


# Two layers, four experts, two devices on two hosts, top-1. Ten tokens: seven take 0 then 2, three take 3 then 1.
HAND = Trace.of(np.array([[[0], [2]]] * 7 + [[[3], [1]]] * 3), 4)
SPLIT = [[[0, 1], [2, 3]], [[0, 1], [2, 3]]]
HOSTS = ("left", "right")

"""Scores of placements against plain loops, by hand, and on counts."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.place.score import score
from moeplan.spec.placement import PlacementDevice, PlacementLayer
from moeplan.spec.trace import Trace
from moeplan.tests.routings import random_trace

Layers = Sequence[PlacementLayer]


def by_loops(layers: Layers, devices: Sequence[PlacementDevice], trace: Trace) -> dict[str, float | None]:
    """The definitions, token by token."""
    share = [
        {
            e: [
                (0.0 if e not in held else 1.0 if layer.shares is None else layer.shares[g][held.index(e)])
                for g, held in enumerate(layer.slots)
            ]
            for e in range(trace.num_experts)
        }
        for layer in layers
    ]
    share = [{e: [s / sum(row) for s in row] for e, row in layer.items()} for layer in share]
    hosts = [device.host for device in devices]
    balance = []
    for at, layer in enumerate(share):
        load = [
            sum(trace.expert_counts[at][e] * layer[e][g] for e in layer) / devices[g].speed for g in range(len(hosts))
        ]
        ideal = float(trace.expert_counts[at].sum()) / sum(device.speed for device in devices)
        balance.append(max(load) / ideal)
    found: dict[str, float | None] = {
        "balance_mean": sum(balance) / len(balance),
        "balance_max": max(balance),
        "boundary_cross_device": None,
        "boundary_cross_host": None,
        "fanout_device": None,
        "fanout_host": None,
    }
    if trace.counts_only:
        return found
    single = all(sum(s > 0 for s in row) == 1 for layer in share for row in layer.values())
    rng = np.random.default_rng(0)
    served: list[list[list[int]]] = []  # [layers][tokens][choices]
    for at, layer in enumerate(share):
        draw = np.zeros((trace.tokens, trace.top_k)) if single else rng.random((trace.tokens, trace.top_k))
        served.append([])
        for t in range(trace.tokens):
            row = []
            for k in range(trace.top_k):
                reached, device = 0.0, 0
                for g, s in enumerate(layer[int(trace.expert_ids[t, at, k])]):
                    reached += s
                    if reached > draw[t, k]:
                        device = g
                        break
                row.append(device)
            served[-1].append(row)
    cells = len(layers) * trace.tokens
    found["fanout_device"] = sum(len(set(row)) for layer in served for row in layer) / cells
    found["fanout_host"] = sum(len({hosts[g] for g in row}) for layer in served for row in layer) / cells
    if single and len(layers) > 1:
        steps = [(a[0], b[0]) for one, two in pairwise(served) for a, b in zip(one, two, strict=True)]
        found["boundary_cross_device"] = sum(a != b for a, b in steps) / len(steps)
        found["boundary_cross_host"] = sum(hosts[a] != hosts[b] for a, b in steps) / len(steps)
    return found


def agree(layers: Layers, devices: Sequence[PlacementDevice], trace: Trace) -> None:
    ours = score(layers, devices, trace).model_dump()
    for name, expected in by_loops(layers, devices, trace).items():
        assert ours[name] == (None if expected is None else pytest.approx(expected, rel=1e-12)), name


@st.composite
def placed(draw: st.DrawFn, copies: bool) -> tuple[list[PlacementLayer], list[PlacementDevice], Trace]:
    seed, layers, experts = draw(st.integers(0, 10**6)), draw(st.integers(1, 3)), draw(st.integers(3, 9))
    devices, top_k = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(layers):
        on = np.zeros((experts, devices), bool)
        on[np.arange(experts), rng.integers(0, devices, experts)] = True
        if copies:
            on |= rng.random(on.shape) < 0.3
        slots = tuple(tuple(np.flatnonzero(column).tolist()) for column in on.T)
        shares = None
        if copies and draw(st.booleans()):
            part = np.where(on, rng.random(on.shape) * (rng.random(on.shape) < 0.9), 0.0)
            part = np.where(part.sum(axis=1, keepdims=True) > 0, part, on)
            part /= part.sum(axis=1, keepdims=True)
            shares = tuple(tuple(part[list(held), g].tolist()) for g, held in enumerate(slots))
        found.append(PlacementLayer(slots=slots, shares=shares))
    names = draw(st.permutations(["b", "a", "c", "a", "b"]))[:devices]
    speed = rng.uniform(0.5, 2.0, devices) if draw(st.booleans()) else np.ones(devices)
    fleet = [PlacementDevice(host=h, speed=float(s), capacity=experts) for h, s in zip(names, speed, strict=True)]
    return found, fleet, random_trace(seed, layers, experts, draw(st.integers(1, 40)), top_k)


@settings(max_examples=40)
@given(placed(copies=False))
def test_single_copies_agree_with_plain_loops(case):
    agree(*case)


@settings(max_examples=40)
@given(placed(copies=True))
def test_replicas_agree_with_plain_loops(case):
    agree(*case)


@settings(max_examples=20)
@given(placed(copies=True))
def test_counts_agree_with_plain_loops(case):
    layers, devices, trace = case
    agree(layers, devices, Trace.of_counts(trace.expert_counts))


def test_by_hand():
    # Two layers, four experts, two devices on two hosts. Ten tokens: seven take 0 then 2, three take 3 then 1.
    ids = np.array([[[0], [2]]] * 7 + [[[3], [1]]] * 3)
    layers = [PlacementLayer(slots=((0, 1), (2, 3))), PlacementLayer(slots=((0, 1), (2, 3)))]
    found = score(layers, [PlacementDevice(host=h, capacity=2) for h in "ab"], Trace.of(ids, 4))
    assert found.tokens == 10
    assert found.balance_mean == pytest.approx(1.4)
    assert found.boundary_cross_device == found.boundary_cross_host == 1.0
    fast_second = [PlacementDevice(host="a", capacity=2), PlacementDevice(host="a", capacity=2, speed=3.0)]
    found = score(layers, fast_second, Trace.of(ids, 4))
    assert found.balance_max == pytest.approx(7 / 2.5)
    assert found.balance_mean == pytest.approx((7 / 2.5 + 3 / 2.5) / 2)
    assert (found.boundary_cross_device, found.boundary_cross_host) == (1.0, 0.0)


def test_a_copy_without_a_share_is_no_second_copy():
    trace = random_trace(0, 2, 4)
    devices = [PlacementDevice(host=h, capacity=3) for h in "ab"]
    plain = PlacementLayer(slots=((0, 1), (2, 3)))
    idle = PlacementLayer(slots=((0, 1), (1, 2, 3)), shares=((1.0, 1.0), (0.0, 1.0, 1.0)))
    assert score([idle, plain], devices, trace) == score([plain, plain], devices, trace)


def test_a_layer_without_load_is_balanced():
    found = score(
        [PlacementLayer(slots=((0,), (1,)))] * 2,
        [PlacementDevice(host="a", capacity=1)] * 2,
        Trace.of_counts(np.array([[0.0, 0.0], [3.0, 1.0]])),
    )
    assert (found.balance_mean, found.balance_max) == (1.25, 1.5)
    assert found.fanout_device is None

"""The expert permutation for Megatron-Core leaves what a layer computes as it was."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.export import export
from moeplan.planner.export.megatron import permute
from moeplan.spec.errors import MoeplanError
from moeplan.tests.exports import linear_placement, placement_of, random_placement, small_model

# T tokens, D model, F expert size, E experts, K top-k


def moe(
    x_TD: np.ndarray, router_ED: np.ndarray, bias_E: np.ndarray, up_EDF: np.ndarray, down_EFD: np.ndarray, groups: int
) -> np.ndarray:
    """Sigmoid top-2 with a bias in the choice, of the best group only; rows of the router after E are identities."""
    scores = 1 / (1 + np.exp(-x_TD @ router_ED.T))
    ranks = scores + bias_E
    experts = len(up_EDF)
    if groups > 1:
        by_group = ranks[:, :experts].reshape(len(x_TD), groups, -1)
        best = by_group.max(axis=2).argmax(axis=1)
        outside = np.arange(experts)[None] // (experts // groups) != best[:, None]
        ranks[:, :experts][outside] = -np.inf
    out = np.zeros_like(x_TD)
    for t, row in enumerate(ranks):
        for e in np.sort(np.argsort(row)[-2:]):
            y = np.maximum(x_TD[t] @ up_EDF[e], 0) @ down_EFD[e] if e < experts else x_TD[t]
            out[t] += scores[t, e] * y
    return out


def layer(seed: int, experts: int, identities: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = ((20, 6), (experts + identities, 6), (experts + identities,), (experts, 6, 5), (experts, 5, 6))
    return tuple(rng.normal(size=shape) for shape in shapes)


def permuted(order: list[int], arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return (arrays[0], *(permute(array, order) for array in arrays[1:]))


@given(seed=st.integers(0, 2**32), devices=st.integers(2, 4), size=st.integers(1, 4), identities=st.integers(0, 3))
@settings(max_examples=40)
def test_permuted_layer_computes_the_same(seed: int, devices: int, size: int, identities: int) -> None:
    experts = devices * size
    placement = random_placement(seed, experts, devices, size, layers=2)
    text = export(placement, "megatron", small_model(experts, 2)).files["expert-permutation.json"]
    for i, order in enumerate(json.loads(text)["layers"].values()):
        arrays = layer(seed + i, experts, identities)
        moved = permuted(order, arrays)
        assert np.allclose(moe(*moved, groups=1), moe(*arrays, groups=1), rtol=0, atol=1e-12)
        for rank, held in enumerate(placement.layers[i].slots):
            block = slice(rank * size, (rank + 1) * size)
            assert np.array_equal(moved[3][block], arrays[3][sorted(held)])


def test_groups_of_the_router_stay_whole() -> None:
    """4 groups of 2: moved whole, the layer computes the same; split ones are refused, as the output would change."""
    model = small_model(8, 1, groups=4)
    placement = placement_of([[[6, 3, 7, 2], [0, 4, 5, 1]]], 8)
    (order,) = json.loads(export(placement, "megatron", model).files["expert-permutation.json"])["layers"].values()
    assert order == [2, 3, 6, 7, 0, 1, 4, 5]
    arrays = layer(0, 8)
    assert np.allclose(moe(*permuted(order, arrays), groups=4), moe(*arrays, groups=4), rtol=0, atol=1e-12)
    split = [0, 2, 4, 6, 1, 3, 5, 7]
    assert not np.allclose(moe(*permuted(split, arrays), groups=4), moe(*arrays, groups=4))
    with pytest.raises(MoeplanError, match=r"layer 1: positions 0..1 would mix router groups \[0, 1\]"):
        export(placement_of([[split[:4], split[4:]]], 8), "megatron", model)
    wider = placement_of([[[2], [3], [0], [1], [7], [6], [4], [5]]], 8)
    export(wider, "megatron", model)


def test_flags() -> None:
    model = small_model(4, 1)
    exported = export(linear_placement(model, 2), "megatron", model)
    assert exported.files["megatron-flags.txt"].split() == exported.command
    flags = dict(zip(exported.command[::2], exported.command[1::2], strict=True))
    assert flags == {
        "--expert-model-parallel-size": "2",
        "--expert-tensor-parallel-size": "1",
        "--tensor-model-parallel-size": "1",
        "--pipeline-model-parallel-size": "1",
        "--moe-token-dispatcher-type": "alltoall",
    }


@pytest.mark.parametrize("order", [[0, 0, 1], [1, 2, 3], [0, 1, 2, 3, 4]])
def test_no_permutation_is_refused(order: list[int]) -> None:
    with pytest.raises(ValueError, match="order"):
        permute(np.zeros((4, 2)), order)

"""Counted work against a loop over the choices, and against the products that an implementation really asks for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from moeplan.runtime.kernels import counting
from moeplan.runtime.kernels.grouped import GroupedKernels
from moeplan.tests.kernel_cases import problem
from moeplan.tests.yardsticks.reindex import reindex_vector

GROUPED = GroupedKernels()


def loop(ids, experts, inputs, outputs):
    """Multiply-adds of one product per choice, two operations each; elements of weights, rows and choices touched."""
    flops, weights, rows = 0, set(), set()
    for t, row in enumerate(ids.tolist()):
        for e in row:
            if e >= 0:
                flops += sum(2 for _ in range(inputs) for _ in range(outputs))
                weights.add(e)
                rows.add(t)
    return flops, len(weights) * inputs * outputs, len(rows)


@settings(max_examples=30)
@given(
    st.integers(0, 12), st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(0, 6), st.integers(0, 99)
)
def test_counts_are_those_of_a_loop(tokens, experts, top_k, inputs, outputs, seed):
    ids = problem(tokens, experts, top_k, seed=seed).ids
    flops, weights, rows = loop(ids, experts, inputs, outputs)
    choices = int((ids >= 0).sum())
    named = 8 * ids.numel()
    esmm = counting.count_esmm(ids, experts, inputs, outputs, torch.float32)
    assert esmm == (flops, 4 * (rows * inputs + weights) + named, 4 * ids.numel() * outputs, 0)
    estmm = counting.count_estmm(ids, experts, inputs, outputs, torch.bfloat16)
    assert estmm[:2] == (flops, 2 * (rows * inputs + choices * outputs) + named)
    assert estmm.written == 2 * experts * inputs * outputs
    esfk = counting.count_esfk(ids, experts, inputs, outputs, torch.float32)
    assert esfk.flops == 2 * flops
    assert counting.count_ess(ids, experts, outputs, torch.float32).flops == choices * outputs
    forward = counting.count_expert_ffn(ids, experts, 2, outputs, inputs, torch.float32)
    assert forward.flops == 3 * flops
    assert forward.bytes == 4 * (rows * inputs + 3 * weights + tokens * inputs) + 12 * ids.numel()
    backward = counting.count_expert_ffn_backward(ids, experts, 2, outputs, inputs, torch.float32)
    assert backward.flops == 6 * flops


@settings(max_examples=30)
@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 2, 16]), st.integers(0, 99))
def test_padding_is_that_of_the_reindex_vector(tokens, experts, top_k, tile, seed):
    ids = problem(tokens, experts, top_k, seed=seed).ids
    padded = int((reindex_vector(ids, experts, tile) < 0).sum())
    assert counting.routed(ids, experts, tile).padding == padded
    assert counting.count_esmm(ids, experts, 3, 5, torch.float32, tile=tile).padding == 2 * 3 * 5 * padded
    assert counting.count_expert_ffn(ids, experts, 2, 5, 3, torch.float32, tile=tile).padding == 6 * 3 * 5 * padded
    assert counting.count_expert_ffn_backward(ids, experts, 2, 5, 3, torch.float32, tile=tile).padding == (
        12 * 3 * 5 * padded
    )


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("matrices", [1, 2])
def test_grouped_products_are_exactly_those_of_the_routed_rows(top_k, matrices):
    p = problem(29, 6, top_k, 16, 24, matrices)
    activation = "gelu"
    shape = p.ids, 6, matrices, 24, 16, torch.float32
    with FlopCounterMode(display=False) as counter:
        _, saved = GROUPED.forward(*p, activation, True)
    assert counter.get_total_flops() == counting.count_expert_ffn(*shape).flops
    with FlopCounterMode(display=False) as counter:
        GROUPED.backward(torch.randn(29, 16), *p, saved, activation)
    assert counter.get_total_flops() == counting.count_expert_ffn_backward(*shape).flops
    weight, dy = p.gate_up.flatten(1, 2), torch.randn(29, top_k, matrices * 24)
    sizes = p.ids, 6, 16, matrices * 24, torch.float32
    for call, count in (
        (lambda: GROUPED.esmm(p.x, weight, None, p.ids), counting.count_esmm),
        (lambda: GROUPED.estmm(p.x, dy, p.ids, 6), counting.count_estmm),
        (lambda: GROUPED.esfk(p.x, weight, dy, p.ids, False), counting.count_esfk),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == count(*sizes).flops

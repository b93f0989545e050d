"""Kernels against the definition, in every type, with idle experts, absent ids and no tokens."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.runtime.kernels import dense_ffn, expert_ffn, implementations, linear, register
from moeplan.runtime.kernels.registry import ENVIRONMENT
from moeplan.spec import MoeplanError

torch.set_num_threads(1)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def problem(tokens=13, experts=5, top_k=3, hidden=16, ffn=24, matrices=2, dtype=torch.float32, seed=0):
    """Random inputs; about a third of the ids are -1, and expert 1 is idle."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=g)
    gate_up = torch.randn(experts, matrices, ffn, hidden, generator=g) / hidden**0.5
    down = torch.randn(experts, hidden, ffn, generator=g) / ffn**0.5
    ids = torch.rand(tokens, experts, generator=g).argsort(1)[:, :top_k]
    ids[torch.rand(ids.shape, generator=g) < 0.3] = -1
    ids[ids == 1] = -1
    return x.to(dtype), gate_up.to(dtype), down.to(dtype), ids, torch.rand(ids.shape, generator=g)


def definition(x, gate_up, down, ids, weights, activation):
    """y[t] = sum over k of weights[t, k] * FFN_{ids[t, k]}(x[t]), token by token, in float64."""
    x, gate_up, down, weights = (t.double() for t in (x, gate_up, down, weights))
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for e, w in zip(ids[t].tolist(), weights[t], strict=True):
            if e >= 0:
                h = ACTIVATIONS[activation](gate_up[e, 0] @ x[t])
                y[t] += w * (down[e] @ (h * (gate_up[e, 1] @ x[t]) if gate_up.shape[1] == 2 else h))
    return y


@pytest.mark.parametrize("implementation", ["reference", "grouped"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("matrices", "activation"), [(2, "silu"), (1, "relu"), (2, "gelu")])
def test_equals_the_definition(implementation, dtype, matrices, activation):
    inputs = problem(matrices=matrices, dtype=dtype)
    want = definition(*inputs, activation)
    got = expert_ffn(*inputs, activation=activation, implementation=implementation)
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() < TOLERANCE[dtype] * want.abs().max()


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 6),
    top_k=st.integers(1, 6),
    ffn=st.integers(0, 9),
    matrices=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_grouped_equals_reference(tokens, experts, top_k, ffn, matrices, seed):
    inputs = problem(tokens, experts, min(top_k, experts), 8, ffn, matrices, seed=seed)
    inputs = (*inputs[:3], inputs[3].to(torch.int32), inputs[4])
    want = expert_ffn(*inputs, activation="silu", implementation="reference")
    got = expert_ffn(*inputs, activation="silu", implementation="grouped")
    assert got.shape == (tokens, 8)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "grouped"])
def test_no_expert_here_gives_zeros(implementation):
    x, gate_up, down, ids, weights = problem()
    nobody = torch.full_like(ids, -1)
    assert not expert_ffn(x, gate_up, down, nobody, weights, activation="silu", implementation=implementation).any()
    none = expert_ffn(x, gate_up[:0], down[:0], nobody, weights, activation="silu", implementation=implementation)
    assert none.shape == x.shape
    assert not none.any()


@pytest.mark.parametrize("implementation", ["reference", "grouped"])
def test_sums_in_float32(implementation):
    """Many small contributions in bf16: a bf16 sum would lose them."""
    experts = 64
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    gate_up, down = torch.ones(experts, 1, 1, 1, dtype=torch.bfloat16), torch.ones(experts, 1, 1, dtype=torch.bfloat16)
    weights = torch.full((1, experts), 1 / 512)
    weights[0, 0] = 1.0
    ids = torch.arange(experts)[None]
    got = expert_ffn(x, gate_up, down, ids, weights, activation="relu", implementation=implementation)
    assert got.item() == torch.tensor(1 + 63 / 512).bfloat16().item() != 1.0


@pytest.mark.parametrize("implementation", ["reference", "grouped"])
@pytest.mark.parametrize(("matrices", "activation"), [(2, "silu"), (1, "gelu")])
def test_gradients(implementation, matrices, activation):
    x, gate_up, down, ids, weights = problem(5, 3, 2, 4, 3, matrices, torch.float64)
    leaves = [t.double().requires_grad_() for t in (x, gate_up, down, weights)]

    def run(x, gate_up, down, weights):
        return expert_ffn(x, gate_up, down, ids, weights, activation=activation, implementation=implementation)

    assert torch.autograd.gradcheck(run, leaves)
    run(*leaves).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 33])
def test_linear_and_dense_equal_torch(rows, dtype):
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=g).to(dtype) for s in ((rows, 32), (48, 32), (48,)))
    got = linear(x, weight, bias)
    assert got.is_contiguous()
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got, F.linear(x, weight, bias), **tolerance)
    gate_up, down = weight.view(2, 24, 32) / 6, torch.randn(32, 24, generator=g).to(dtype) / 5
    want = F.linear(F.silu(F.linear(x, gate_up[0])) * F.linear(x, gate_up[1]), down)
    torch.testing.assert_close(dense_ffn(x, gate_up, down, activation="silu"), want, **tolerance)


def test_wrong_arguments_are_named():
    x, gate_up, down, ids, weights = problem()
    cases = [
        ("x", r"\[tokens, model\], got torch.float32 \[16\]", (x[0], gate_up, down, ids, weights)),
        ("gate_up", r"\[experts, 1 or 2, ffn, 16\]", (x, gate_up[..., :5], down, ids, weights)),
        ("gate_up", "got torch.bfloat16", (x, gate_up.bfloat16(), down, ids, weights)),
        ("down", r"expected torch.float32 \[5, 16, 24\], got", (x, gate_up, down[:4], ids, weights)),
        ("ids", "int32 or int64", (x, gate_up, down, ids.float(), weights)),
        ("ids", r"\[13, top_k\]", (x, gate_up, down, ids[1:], weights)),
        ("weights", r"float32 \[13, 3\]", (x, gate_up, down, ids, weights[:, 1:])),
        ("weights", "got torch.bfloat16", (x, gate_up, down, ids, weights.bfloat16())),
    ]
    for name, message, arguments in cases:
        with pytest.raises(MoeplanError, match=f"^expert_ffn: {name}: .*{message}") as caught:
            expert_ffn(*arguments, activation="silu")
        assert "\n" not in str(caught.value)
    for implementation in ("reference", "grouped"):
        with pytest.raises(MoeplanError, match=r"^expert_ffn: ids: expected -1..4, got 5$"):
            expert_ffn(x, gate_up, down, ids.clamp(min=5), weights, activation="silu", implementation=implementation)
    with pytest.raises(MoeplanError, match=r"activation: expected one of .*'silu'.*got 'tanh'"):
        expert_ffn(x, gate_up, down, ids, weights, activation="tanh")


def test_implementations_are_chosen_by_argument_then_environment(monkeypatch):
    from moeplan.runtime.kernels import registry

    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", dict(registry._IMPLEMENTATIONS))
    inputs = problem()
    register("constant", lambda x, *rest: torch.full_like(x, 7.0))
    assert implementations() == ("reference", "grouped", "constant")
    monkeypatch.setenv(ENVIRONMENT, "constant")
    assert (expert_ffn(*inputs, activation="silu") == 7).all()
    assert (expert_ffn(*inputs, activation="silu", implementation="grouped") != 7).any()
    monkeypatch.setenv(ENVIRONMENT, "cuda-magic")
    with pytest.raises(MoeplanError, match="expected one of constant, grouped, reference, got 'cuda-magic'"):
        expert_ffn(*inputs, activation="silu")

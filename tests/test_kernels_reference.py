"""The reference's derivatives against numerical ones, in float64; the activations; the order of choices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.runtime.kernels import esfk, esmm, ess, estmm
from moeplan.runtime.kernels.activation import ACTIVATIONS, activate, activate_backward
from moeplan.runtime.kernels.reindex import by_expert
from moeplan.spec import MoeplanError
from moeplan.tests.kernel_cases import FFNS, problem
from moeplan.tests.yardsticks.reindex import reindex_vector

F64 = ("reference", "grouped")


@pytest.mark.parametrize("name", F64)
@pytest.mark.parametrize(("matrices", "activation"), FFNS)
@pytest.mark.parametrize("biases", [False, True])
def test_gradcheck_of_expert_ffn(name, matrices, activation, biases):
    p = problem(4, 3, 2, 3, 4, matrices, dtype=torch.float64, biases=biases)
    floats = {n: t.requires_grad_() for n, t in p.floats().items()}

    def run(*leaves):
        return p._replace(**dict(zip(floats, leaves, strict=True))).run(activation, name)

    assert torch.autograd.gradcheck(run, list(floats.values()))


@pytest.mark.parametrize("name", F64)
@pytest.mark.parametrize("own_rows", [False, True])
def test_gradcheck_of_the_operators_twice(name, own_rows):
    g = torch.Generator().manual_seed(0)
    ids = torch.tensor([[0, 2], [2, 2], [-1, 0]])

    def leaf(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    x, dy, weight, bias = leaf(*((3, 2, 2) if own_rows else (3, 2))), leaf(3, 2, 3), leaf(3, 3, 2), leaf(3, 3)
    cases = [
        (lambda x, w, b: esmm(x, w, ids, bias=b, implementation=name), (x, weight, bias)),
        (lambda w, b: esmm(x.detach(), w, ids, bias=b, implementation=name), (weight, bias)),
        (lambda dy: ess(dy, ids, 3, implementation=name), (dy,)),
        (lambda x, dy: estmm(x, dy, ids, 3, implementation=name), (x, dy)),
        (lambda x, w, dy: esfk(x, w, dy, ids, with_bias=True, implementation=name), (x, weight, dy)),
        (lambda x, w, dy: esfk(x, w, dy, ids, implementation=name)[:2], (x, weight, dy)),
    ]
    for function, leaves in cases:
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_expert_ffn_is_differentiable_once():
    p = problem(4, 3, 2, 3, 4, dtype=torch.float64)
    x = p.x.requires_grad_()
    (dx,) = torch.autograd.grad(p.run("silu", "reference").sum(), x, create_graph=True)
    with pytest.raises(MoeplanError, match="expected one derivative, got a second"):
        dx.sum().backward()


@pytest.mark.parametrize(("matrices", "activation"), [*FFNS, *((m, a) for a in ACTIVATIONS for m in (1, 2))])
@pytest.mark.parametrize("dim", [0, 1])
def test_derivatives_of_activations(matrices, activation, dim):
    projected = 6 * torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    projected.requires_grad_()
    y = activate(projected, matrices, activation, dim)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (want,) = torch.autograd.grad(y, projected, dy)
    torch.testing.assert_close(activate_backward(dy, projected.detach(), matrices, activation, dim), want)


@settings(max_examples=50)
@given(st.integers(0, 20), st.integers(0, 5), st.integers(1, 4), st.sampled_from([1, 4, 16]), st.integers(0, 2**30))
def test_order_of_choices(tokens, experts, top_k, tile, seed):
    ids = torch.randint(-1, max(experts, 1), (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    ids = ids if experts else torch.full_like(ids, -1)
    order, counts = by_expert(ids, experts, "test")
    assert counts == [int((ids == e).sum()) for e in range(experts)]
    want = [(e, p) for e in range(experts) for p in (ids.flatten() == e).nonzero().flatten().tolist()]
    assert order.tolist() == [p for _, p in want]
    vector = reindex_vector(ids, experts, tile)
    tiles = vector.view(-1, tile)
    assert [p for p in vector.tolist() if p >= 0] == order.tolist()
    assert len(tiles) == sum(-(-n // tile) for n in counts)
    assert all(len({int(ids.flatten()[p]) for p in row if p >= 0}) == 1 for row in tiles.tolist())

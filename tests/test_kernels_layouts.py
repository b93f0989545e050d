"""The expert FFN on weights as Transformers keeps them, and its activations, against plain loops in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.runtime.kernels import expert_ffn, weights_of
from moeplan.runtime.kernels.activation import activate, clamped, parse_activation
from moeplan.runtime.kernels.stored import Layout, layout_of
from moeplan.spec import MoeplanError
from moeplan.tests.kernel_cases import FFNS, LAYOUTS, MORE_FFNS, available, error, problem

torch.set_num_threads(1)

HERE = available()
EACH = [(transposed, interleaved) for transposed in (False, True) for interleaved in (False, True)]


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


PLAIN = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: torch.where(x > 0, x, 0),
    "relu2": lambda x: torch.where(x > 0, x, 0) ** 2,
}


def stored(p, transposed, interleaved):
    """Leaves as a module has them: gate_up, its bias, down, its bias, x, gate weights."""
    matrices = p.gate_up.shape[1]
    interleaved = interleaved and matrices == 2

    def flat(t):
        return torch.stack([t[:, 0], t[:, 1]], 2).flatten(1, 2) if interleaved else torch.cat(t.unbind(1), 1)

    up, down = flat(p.gate_up), p.down
    if transposed:
        up, down = up.mT, down.mT
    bias = None if p.gate_up_bias is None else flat(p.gate_up_bias)
    found = {"gate_up": up, "bias": bias, "down": down, "down_bias": p.down_bias, "x": p.x, "weights": p.weights}
    return {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in found.items() if t is not None}


def loop(leaves, ids, matrices, activation, transposed, interleaved):
    """Experts one by one, in the stored layout."""
    x, gated = leaves["x"], matrices == 2
    y = 0 * x
    for t, k in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(ids.shape[1])).tolist():
        e = int(ids[t, k])
        if e < 0:
            continue
        up, down = leaves["gate_up"][e], leaves["down"][e]
        h = x[t] @ (up if transposed else up.T)
        h = h + leaves["bias"][e] if "bias" in leaves else h
        if gated:
            half = len(h) // 2
            gate, value = (h[0::2], h[1::2]) if interleaved else (h[:half], h[half:])
            if activation.startswith("swiglu_clamped"):
                numbers = activation.partition("(")[2].rstrip(")")
                slope, limit, shift = map(float, numbers.split(",")) if numbers else (1.702, 7.0, 1.0)
                gate, value = torch.clamp(gate, max=limit), torch.clamp(value, -limit, limit)
                h = (value + shift) * gate / (1 + torch.exp(-slope * gate))
            else:
                h = PLAIN[activation](gate) * value
        else:
            h = PLAIN[activation](h)
        out = h @ (down if transposed else down.T)
        out = out + leaves["down_bias"][e] if "down_bias" in leaves else out
        y = y.index_add(0, torch.tensor([t]), (leaves["weights"][t, k] * out)[None])
    return y


def results(compute, leaves):
    """Output, and the gradient of every leaf."""
    leaves = {n: t.requires_grad_() for n, t in leaves.items()}
    y = compute(leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    gradients = torch.autograd.grad(y, tuple(leaves.values()), dy, materialize_grads=True, allow_unused=True)
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def both(name, p, activation, transposed, interleaved):
    """What the kernels give, and the loop in float64."""
    matrices = p.gate_up.shape[1]
    leaves = stored(p, transposed, interleaved)

    def kernel(t):
        views = weights_of(
            t["gate_up"],
            t["down"],
            t.get("bias"),
            gated=matrices == 2,
            transposed=transposed,
            interleaved=interleaved,
        )
        given = {"gate_up_bias": views.gate_up_bias, "down_bias": t.get("down_bias"), "implementation": name}
        return expert_ffn(t["x"], views.gate_up, views.down, p.ids, t["weights"], activation=activation, **given)

    wide = {n: t.double() for n, t in leaves.items()}
    plain = results(lambda t: loop(t, p.ids, matrices, activation, transposed, interleaved and matrices == 2), wide)
    return results(kernel, leaves), plain


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(("transposed", "interleaved"), EACH)
@pytest.mark.parametrize(("matrices", "activation"), [*FFNS, *MORE_FFNS])
def test_equals_plain_loops(name, transposed, interleaved, matrices, activation):
    p = problem(matrices=matrices, biases=True)
    p = p._replace(x=4 * p.x) if "clamped" in activation else p  # reaches the clamps
    got, want = both(name, p, activation, transposed, interleaved)
    assert {part: e for part in want if (e := error(got[part], want[part])) > 1e-5} == {}


@pytest.mark.parametrize("name", HERE)
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 20),
    experts=st.integers(1, 4),
    top_k=st.integers(1, 3),
    model=st.integers(1, 40),
    ffn=st.integers(1, 40),
    kind=st.sampled_from([*FFNS, *MORE_FFNS]),
    lies=st.sampled_from(EACH),
    biases=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(name, tokens, experts, top_k, model, ffn, kind, lies, biases, seed):
    p = problem(tokens, experts, top_k, model, ffn, kind[0], biases=biases, seed=seed)
    got, want = both(name, p, kind[1], *lies)
    assert {part: e for part in want if (e := error(got[part], want[part])) > 2e-5} == {}


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("transposed", "interleaved"), LAYOUTS)
def test_low_precision_is_as_near_as_with_the_usual_layout(name, dtype, transposed, interleaved):
    p = problem(48, 4, 2, 64, 96, biases=True).to(dtype)
    want = p.to(torch.float64).results("swiglu_clamped", "reference")
    usual = p.results("swiglu_clamped", name)
    got = p.lying(transposed, interleaved).results("swiglu_clamped", name)
    over = {part: (error(got[part], want[part]), error(usual[part], want[part])) for part in want}
    assert {part: pair for part, pair in over.items() if pair[0] > 1.5 * pair[1] + 1e-3} == {}


@pytest.mark.parametrize(("transposed", "interleaved"), EACH)
def test_gradients_lie_as_the_weights_do(transposed, interleaved):
    for name in HERE:
        p = problem(biases=True).lying(transposed, interleaved)
        got = p.results("silu", name)
        for part in ("gate_up", "down", "gate_up_bias"):
            assert got[part].stride() == getattr(p, part).stride(), (name, part)


def test_layouts_are_told_by_their_strides():
    p = problem()
    assert layout_of(p.gate_up, p.down) == Layout()
    for transposed, interleaved in LAYOUTS:
        q = p.lying(transposed, interleaved)
        assert layout_of(q.gate_up, q.down) == Layout(transposed, interleaved, transposed)
        assert q.gate_up.equal(p.gate_up)
    assert layout_of(p.gate_up[..., :8], p.down) is None
    assert layout_of(p.gate_up, p.down[:, :, :8]) is None


def test_the_compiler_knows_the_strides():
    p = problem(biases=True).lying(True, True)

    def run(x, gate_up, down):
        return expert_ffn(x, gate_up, down, p.ids, p.weights, activation="relu2", implementation="grouped")

    inputs = [t.detach().clone().requires_grad_() for t in (p.x, p.gate_up, p.down)]
    want = torch.autograd.grad(run(*inputs).sum(), inputs)
    got = torch.autograd.grad(torch.compile(run, backend="aot_eager")(*inputs).sum(), inputs)
    assert all(torch.allclose(a, b) and a.stride() == b.stride() for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "text", ["tanh", "silu(1)", "swiglu_clamped(1, 2)", "swiglu_clamped(1, x, 1)", "swiglu_clamped(1, -1, 1)", ""]
)
def test_wrong_activations_are_named(text):
    with pytest.raises(MoeplanError, match=r"^activation: expected one of .*relu2.*got '"):
        parse_activation(text)


def test_numbers_of_the_clamped_activation():
    assert parse_activation("swiglu_clamped") == parse_activation(clamped(1.702, 7, 1))
    assert parse_activation(clamped(1.0, 10.0, 0.0)).limit == 10
    x = torch.randn(5, 8, dtype=torch.float64)
    gate, up = x.chunk(2, -1)
    unclamped = activate(x, 2, clamped(1, float("inf"), 0))
    assert torch.allclose(unclamped, torch.nn.functional.silu(gate) * up)


def test_shapes_that_do_not_go_together_are_named():
    up, down = torch.zeros(3, 12, 8), torch.zeros(3, 8, 6)
    cases = [
        (r"gate_up_proj: expected \[E, 2 H, D\], got \[3, 11, 8\]", (up[:, :11], down, None), {}),
        (r"down_proj: expected \[3, 8, 6\], got \[3, 6, 8\]", (up, down.mT, None), {}),
        (r"gate_up_proj_bias: expected \[3, 12\], got \[3, 6\]", (up, down, torch.zeros(3, 6)), {}),
        (
            r"gate_up_proj: expected \[E, D, 2 H\], got \[3, 8, 11\]",
            (up.mT[..., :11], down.mT, None),
            {"transposed": 1},
        ),
        (r"down_proj: expected \[3, 8, 12\], got \[3, 8, 6\]", (up, down, None), {"gated": False}),
    ]
    for message, arguments, ways in cases:
        with pytest.raises(MoeplanError, match=f"^weights_of: {message}$"):
            weights_of(*arguments, **ways)

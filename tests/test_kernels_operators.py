"""The kernels as operators of torch: each implementation against the reference, opcheck, compiled graphs, bad input."""

import pytest
import torch

from moeplan.runtime.kernels import esfk, esmm, ess, estmm
from moeplan.runtime.kernels.registry import choose
from moeplan.spec import MoeplanError
from moeplan.tests.kernel_cases import available, error, problem

torch.set_num_threads(1)

HERE = available()
ops = torch.ops.moeplan


def projection(dtype=torch.float32, own_rows=False, tokens=37, top_k=3, experts=6, inputs=33, outputs=50):
    """x, weight, bias, dy, ids; expert 1 is idle, and some choices are elsewhere."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, experts, (tokens, top_k), generator=g)
    ids[ids == 1] = 0
    shape = (tokens, top_k, inputs) if own_rows else (tokens, inputs)
    sizes = shape, (experts, outputs, inputs), (experts, outputs), (tokens, top_k, outputs)
    return [*(torch.randn(size, generator=g).to(dtype) for size in sizes), ids]


def results(x, weight, bias, dy, ids, name):
    experts = len(weight)
    return {
        "esmm": esmm(x, weight, ids, bias=bias, implementation=name),
        "esmm without bias": esmm(x, weight, ids, implementation=name),
        "ess": ess(dy, ids, experts, implementation=name),
        "estmm": estmm(x, dy, ids, experts, implementation=name),
        **dict(zip("xwb", esfk(x, weight, dy, ids, with_bias=True, implementation=name), strict=True)),
    }


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own_rows", [False, True])
def test_operators_equal_the_reference(name, dtype, own_rows):
    given = projection(dtype, own_rows)
    want = results(*(t.double() if t.is_floating_point() else t for t in given), "reference")
    got = results(*given, name)
    assert {n: t.dtype for n, t in got.items()} == dict.fromkeys(got, dtype)
    # Sums in float32, rounded at the end: half a unit in the last place of the result, and the bias's rounding.
    limit = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert {n: e for n in want if (e := error(got[n], want[n])) > limit} == {}


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(
    "sizes", [{"tokens": 0}, {"experts": 2}, {"top_k": 1}, {"inputs": 1}, {"outputs": 1}, {"tokens": 1}]
)
def test_odd_sizes(name, sizes):
    given = projection(**sizes)
    want = results(*(t.double() if t.is_floating_point() else t for t in given), "reference")
    got = results(*given, name)
    assert {n: e for n in want if (e := error(got[n], want[n])) > 1e-5} == {}


def test_operators_keep_their_promises_to_torch():
    """opcheck: schemas, fake kernels, autograd registration, tracing with dynamic shapes; the same for every name."""
    name = choose(None, "cpu", torch.float32)
    p = problem(4, 3, 2, 4, 5, biases=True)
    here = p._replace(ids=p.ids.clamp(min=0))  # rows of no choice are undefined in what is saved
    leaves = here._replace(**{n: t.clone().requires_grad_() for n, t in here.floats().items()})
    torch.library.opcheck(ops.expert_ffn.default, (*leaves, "silu", name, True))
    torch.library.opcheck(ops.expert_ffn.default, (*p, "silu", name, False))
    saved = ops.expert_ffn(*p, "silu", name, True)[1]
    torch.library.opcheck(ops.expert_ffn_backward.default, (torch.randn(4, 4), *p, saved, "silu", name))
    x, weight, bias, dy, ids = (t.requires_grad_() if t.is_floating_point() else t for t in projection(tokens=4))
    torch.library.opcheck(ops.esmm.default, (x, weight, bias, ids, name))
    torch.library.opcheck(ops.ess.default, (dy, ids, 6, name))
    torch.library.opcheck(ops.estmm.default, (x, dy, ids, 6, name))
    torch.library.opcheck(ops.esfk.default, (x, weight, dy, ids, True, name))


def test_compiled_whole():
    """One graph, forward and backward, of any number of tokens."""
    name = choose(None, "cpu", torch.float32)

    def run(leaves, activation, implementation):
        return 2 * leaves.run(activation, implementation).tanh()

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, tokens in enumerate((5, 9, 13)):
        p = problem(tokens, biases=True, seed=seed)
        want, got = (p.results("silu", name, path) for path in (run, compiled))
        torch.testing.assert_close(got, want)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(p, "silu", name), run(p, "silu", name))


def test_a_graph_without_saving_has_no_gradient():
    p = problem(4, 3, 2, 4, 5)
    leaves = p._replace(x=p.x.requires_grad_())
    with pytest.raises(MoeplanError, match=r"^expert_ffn: save: expected True where gradients are wanted, got False"):
        ops.expert_ffn(*leaves, "silu", "grouped", False)


def test_wrong_arguments_are_named():
    x, weight, bias, dy, ids = projection()
    p = problem()
    saved = ops.expert_ffn(*p, "silu", "grouped", True)[1]
    cases = [
        (lambda: esmm(x[0], weight, ids), r"esmm: x: expected floating \[tokens, inputs\] or \[37, 3, inputs\], got"),
        (lambda: esmm(x, weight[..., 1:], ids), r"esmm: weight: expected torch.float32 \[experts, outputs, 33\]"),
        (lambda: esmm(x, weight.half(), ids), "esmm: weight: expected torch.float32 .* got torch.float16"),
        (lambda: esmm(x, weight[:, ::2], ids), r"esmm: weight: expected contiguous \[6, 25, 33\]"),
        (lambda: esmm(x, weight, ids, bias=bias[1:]), r"esmm: bias: expected torch.float32 \[6, 50\]"),
        (lambda: esmm(x, weight, ids[:, 0]), r"esmm: ids: expected int32 or int64 \[37, top_k\]"),
        (lambda: esmm(x, weight, ids + 5), r"esmm: ids: expected -1..5, got"),
        (lambda: ess(dy[:, :1], ids, 6), r"ess: dy: expected floating \[tokens, top_k, outputs\] for ids \[37, 3\]"),
        (lambda: ess(dy, ids, -1), "ess: experts: expected 0 or more, got -1"),
        (lambda: ess(dy, ids, 5), r"ess: ids: expected -1..4, got 5$"),
        (lambda: estmm(x, dy.double(), ids, 6), "estmm: dy: expected torch.float32 .* got torch.float64"),
        (lambda: estmm(x, dy, ids, 2), r"estmm: ids: expected -1..1, got [2-5]$"),
        (lambda: esfk(x, weight, dy[..., 1:], ids), r"esfk: dy: expected torch.float32 \[37, 3, 50\]"),
        (lambda: esfk(x, weight, dy, ids - 2), r"esfk: ids: expected -1..5, got -[23]$"),
        (
            lambda: ops.expert_ffn_backward(p.x[1:], *p, saved, "silu", "grouped"),
            r"expert_ffn_backward: dy: expected torch.float32 \[13, 16\], got",
        ),
        (
            lambda: ops.expert_ffn_backward(p.x, *p, saved[1:], "silu", "grouped"),
            r"expert_ffn_backward: saved: expected torch.float32 \[39, 48\], got",
        ),
    ]
    for call, message in cases:
        with pytest.raises(MoeplanError, match=f"^{message}"):
            call()

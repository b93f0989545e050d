"""The Triton kernels in Triton's interpreter, against the reference in float64.

Run by ``test_kernels_gpu`` in a process of its own: the interpreter must be chosen before Triton is imported.

The interpreter rounds float32 to bfloat16 towards zero, so bfloat16 is given about twice the error it has on a GPU.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.runtime.kernels.gpu import TritonKernels, call, config
from moeplan.runtime.kernels.gpu.config import Config
from moeplan.runtime.kernels.gpu.index import reindex
from moeplan.runtime.kernels.gpu.reports import report
from moeplan.runtime.kernels.reference import ReferenceKernels
from moeplan.spec import MoeplanError
from moeplan.tests.kernel_cases import LAYOUTS, MORE_FFNS, Problem, error, problem
from moeplan.tests.yardsticks.reindex import reindex_vector

torch.set_num_threads(1)
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
BLOCKS = Config(rows=16, columns=16, depth=16, warps=4, stages=2)

triton_kernels, reference = TritonKernels(), ReferenceKernels()


@pytest.fixture(autouse=True)
def _memory_holds_nan():
    """Torch fills new memory with NaN: whoever reads a row that nobody has written is found out."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def blocks(monkeypatch):
    """Tiles so small that every loop runs several times; of the usual ones these sizes need one."""
    monkeypatch.setattr(call, "candidates", lambda *_, **__: [BLOCKS])
    monkeypatch.setattr(call, "height", lambda *_: 16)


def gradients_of(kernels, p: Problem, dy, activation):
    y, saved = kernels.forward(*p, activation, True)
    given = (p.x, p.gate_up, p.gate_up_bias, p.down, p.down_bias, p.ids, p.weights)
    return {"y": y} | kernels.backward(dy, *given, saved, activation)._asdict()


def agree(p: Problem, activation: str) -> None:
    """Output and gradients are the reference's in float64, within the type's tolerance of their norm."""
    dy = torch.randn(p.x.shape, generator=torch.Generator().manual_seed(1)).to(p.x.dtype)
    got = gradients_of(triton_kernels, p, dy, activation)
    want = gradients_of(reference, p.to(torch.float64), dy.double(), activation)
    for name, value in want.items():
        if value is None:
            assert got[name] is None
            continue
        assert got[name].dtype == (torch.float32 if name == "weights" else p.x.dtype), name
        assert error(got[name], value) < TOLERANCE[p.x.dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("matrices", "activation", "biases"), [(2, "silu", True), (1, "gelu", False)])
def test_ffn(dtype, matrices, activation, biases):
    agree(problem(21, 3, 2, 24, 36, matrices, dtype=dtype, biases=biases), activation)


def test_many_blocks(blocks):
    """Two tiles of an expert, two or three blocks and steps of each product."""
    agree(problem(30, 2, 2, 20, 35, dtype=torch.bfloat16, biases=True), "silu")


@pytest.mark.parametrize(
    ("matrices", "activation"), [(1, "silu"), (1, "relu"), (2, "gelu"), (2, "relu"), (2, "swiglu_clamped")]
)
def test_activations(matrices, activation):
    p = problem(9, 3, 2, 16, 16, matrices, biases=True)
    # Large enough for both clamps.
    agree(p._replace(x=p.x * 5), activation)


@pytest.mark.parametrize(("matrices", "activation"), MORE_FFNS)
def test_more_activations(matrices, activation):
    agree(problem(9, 3, 2, 16, 16, matrices, biases=True), activation)


@pytest.mark.parametrize(("transposed", "interleaved"), LAYOUTS)
@pytest.mark.parametrize("matrices", [1, 2])
def test_layouts(blocks, transposed, interleaved, matrices):
    """Two blocks and more of each size; what does not fill them."""
    p = problem(21, 3, 2, 35, 20, matrices, biases=True).lying(transposed, interleaved)
    agree(p, "swiglu_clamped" if matrices == 2 else "relu2")


@pytest.mark.parametrize(("transposed", "interleaved"), LAYOUTS)
def test_split_sums_of_layouts(monkeypatch, transposed, interleaved):
    p = problem(3, 2, 2, 129, 130, biases=True)
    want = reference.forward(*p, "silu", True)
    monkeypatch.setattr(call, "candidates", lambda *_, **__: [BLOCKS])
    monkeypatch.setattr(call, "processors", lambda device: 400)
    got = triton_kernels.forward(*p.lying(transposed, interleaved), "silu", True)
    there = (p.ids >= 0).flatten()
    assert error(got[0], want[0]) < 1e-5
    assert error(got[1][there], want[1][there]) < 1e-5


@pytest.mark.parametrize(
    "sizes",
    [
        {"tokens": 0},
        {"tokens": 1, "top_k": 1},
        {"top_k": 0},
        {"experts": 0},
        {"experts": 1, "top_k": 1},
        {"experts": 20, "tokens": 2},
        {"ffn": 0},
        {"ffn": 0, "top_k": 1},
        {"model": 33, "ffn": 7},
        {"model": 1, "ffn": 1},
    ],
    ids=str,
)
def test_sizes(sizes):
    agree(problem(**{"tokens": 7, "biases": True} | sizes), "silu")


@pytest.mark.parametrize("everyone", [-1, 0, 4])
def test_skew(blocks, everyone):
    """All choices nowhere, or all at one expert: each token chooses it twice."""
    p = problem(20, 5, 2, 18, 8, biases=True)
    agree(p._replace(ids=torch.full_like(p.ids, everyone)), "silu")


@settings(max_examples=6)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 4),
    top_k=st.integers(1, 3),
    model=st.integers(1, 20),
    ffn=st.integers(0, 20),
    biases=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_sizes(tokens, experts, top_k, model, ffn, biases, seed):
    p = problem(tokens, experts, top_k, model, ffn, biases=biases, seed=seed)
    agree(p._replace(ids=p.ids.to(torch.int32)), "silu")


@pytest.mark.parametrize("top_k", [1, 2])
def test_split_sums(monkeypatch, top_k):
    """Few choices on a device with many processors: parts of each sum, added up afterwards."""
    p = problem(3, 2, top_k, 129, 130, biases=True)
    weight, splits, split = p.gate_up[:, 0].contiguous(), [], config.with_split
    monkeypatch.setattr(call, "candidates", lambda *_, **__: [BLOCKS])
    monkeypatch.setattr(call, "processors", lambda device: 400)
    monkeypatch.setattr(call, "with_split", lambda *a: splits.append(split(*a)) or splits[-1])
    for got, want in (
        *zip(triton_kernels.forward(*p, "silu", True), reference.forward(*p, "silu", True), strict=True),
        (triton_kernels.esmm(p.x, weight, None, p.ids), reference.esmm(p.x, weight, None, p.ids)),
    ):
        there = (p.ids >= 0).flatten() if len(got) == p.ids.numel() else slice(None)
        assert error(got[there], want[there]) < 1e-5
    assert [c.split for c in splits] == [2, 2, 2]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shared", [True, False])
def test_operators(dtype, shared):
    """Each operator by itself; x with a row for each token, or for each choice, and not contiguous."""
    p = problem(19, 4, 3, 36, 20, dtype=dtype)
    g = torch.Generator().manual_seed(2)
    shape = (36, 19) if shared else (36, 19, 3)
    x = torch.randn(shape, generator=g).to(dtype).movedim(0, -1)
    dy = torch.randn(19, 3, 20, generator=g).to(dtype)
    weight, bias = p.gate_up[:, 0].contiguous(), torch.randn(4, 20, generator=g).to(dtype)
    wide = [t.double() for t in (x, weight, bias, dy)]
    pairs = [
        (triton_kernels.esmm(x, weight, bias, p.ids), reference.esmm(*wide[:3], p.ids)),
        (triton_kernels.ess(dy, p.ids, 4), reference.ess(wide[3], p.ids, 4)),
        (triton_kernels.estmm(x, dy, p.ids, 4), reference.estmm(wide[0], wide[3], p.ids, 4)),
        *zip(
            triton_kernels.esfk(x, weight, dy, p.ids, True),
            reference.esfk(wide[0], wide[1], wide[3], p.ids, True),
            strict=True,
        ),
    ]
    for got, want in pairs:
        assert got.dtype == dtype
        assert got.is_contiguous()
        assert error(got, want) < TOLERANCE[dtype]
    assert triton_kernels.esfk(x, weight, dy, p.ids, False)[2] is None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "experts"), [(1, 1), (13, 5), (700, 3), (20, 40)])
def test_reindex_vector(dtype, tokens, experts):
    """Equals the reference's, place for place; tiles beyond the last have no expert."""
    ids = problem(tokens, experts, 2, 1, 1).ids.to(dtype)
    index = reindex(ids, experts, 16, report(CPU))
    want = reindex_vector(ids, experts, 16)
    counts = torch.bincount(ids[ids >= 0].flatten().long(), minlength=experts)
    needed = (counts + 15) // 16
    assert index.order[: len(want)].tolist() == want.tolist()
    assert index.count.tolist() == counts.tolist()
    assert index.start.tolist() == (16 * (needed.cumsum(0) - needed)).tolist()
    experts_of_tiles = torch.arange(experts).repeat_interleave(needed).tolist()
    assert index.tile_expert.tolist() == experts_of_tiles + [-1] * (index.tiles - len(experts_of_tiles))


@pytest.mark.parametrize("wrong", [5, 900, -2, 2**40])
def test_ids_out_of_range(wrong):
    """An error that names the id, once; nothing is read outside the tensors."""
    p = problem()
    ids = p.ids.clone()
    ids[3, 1] = wrong
    with pytest.raises(MoeplanError, match=rf"^expert_ffn: ids: expected -1\.\.4, got {wrong}$"):
        triton_kernels.forward(*p._replace(ids=ids), "silu", False)
    agree(p, "silu")


def test_nothing_needs_to_be_contiguous(blocks):
    """But the weights, whose copy would be large."""
    p = problem(11, 3, 2, 20, 18, biases=True)
    strided = {n: torch.stack([t, t], -1)[..., 0] for n, t in p._asdict().items() if n not in ("gate_up", "down")}
    agree(p._replace(**strided), "silu")
    for ids, weights in ((p.ids[:, :1], p.weights[:, :1]), (p.ids.t().contiguous().t(), p.weights)):
        agree(p._replace(ids=ids, weights=weights), "silu")


def test_nan_stays_where_it_is():
    """NaN in one expert's weights reaches the tokens that chose it, in every activation, and no others."""
    p = problem(12, 4, 2, 16, 16)
    p.gate_up[2] = torch.nan
    for activation in ("silu", "gelu", "relu", "swiglu_clamped"):
        y, _ = triton_kernels.forward(*p, activation, False)
        chosen = (p.ids == 2).any(1)
        assert y[chosen].isnan().all()
        assert not y[~chosen].isnan().any()


def test_as_torch_operators():
    """Through the entry that users call, with autograd."""
    p = problem(11, 4, 2, 16, 24, biases=True)
    got, want = p.results("silu", "triton"), p.results("silu", "reference")
    for name, value in want.items():
        assert error(got[name], value) < 1e-5, name

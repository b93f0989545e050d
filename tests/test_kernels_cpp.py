"""The C++ kernels against the reference, for every type, instruction set and number of threads; bad input."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.runtime.kernels import counting, memory
from moeplan.runtime.kernels.cpp import obstacle
from moeplan.runtime.kernels.cpp.implementation import VENDOR_FROM, CppKernels
from moeplan.spec import MoeplanError
from moeplan.tests.kernel_cases import FFNS, LAYOUTS, MORE_FFNS, error, problem, torch_path

if reason := obstacle():
    pytest.skip(reason, allow_module_level=True)

from moeplan.tests.kernel_cpp_cases import TYPES, everything, fuzz, isas, too_far

torch.set_num_threads(1)

ISAS = isas()
SKEWED = [(32, 4, 512, 512), (64, 6, 512, 384), (64, 1, 256, 1024)]


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("matrices", "activation"), [*FFNS, (1, "silu"), (1, "gelu"), (2, "relu")])
def test_equals_the_reference(isa, dtype, matrices, activation):
    p = problem(70, 5, 3, 96, 160, matrices, biases=True)
    if dtype == torch.float32:
        p = p._replace(x=3 * p.x)  # reaches the clamps; rounding before them moves values across
    p = p.to(dtype)
    assert too_far(p, activation, isa) == {}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("matrices", "activation"), MORE_FFNS)
def test_more_activations(isa, dtype, matrices, activation):
    p = problem(40, 5, 3, 96, 160, matrices, biases=True, dtype=dtype)
    assert too_far(p, activation, isa) == {}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("transposed", "interleaved"), LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 9, 33, 300])
def test_layouts(isa, dtype, transposed, interleaved, tokens):
    """Few rows, panels with rows after them, several blocks of columns, rows and depth."""
    p = problem(tokens, 3, 1, 550, 330, biases=True, dtype=dtype).lying(transposed, interleaved)
    p = p._replace(ids=(torch.arange(tokens) % 7 // 6 * 2)[:, None])  # most on one expert, one idle
    assert too_far(p, "swiglu_clamped", isa) == {}


@pytest.mark.parametrize(("transposed", "interleaved"), LAYOUTS)
def test_layouts_need_no_copy_of_the_weights(transposed, interleaved):
    """A call's scratch, and what it shares with the usual layout, is a fraction of them."""
    p = problem(8, 16, 2, 512, 512).lying(transposed, interleaved)
    kernels = CppKernels()
    y, saved = kernels.forward(*p, "silu", True)
    assert kernels.scratch_bytes() < (p.gate_up.nbytes + p.down.nbytes) / 4
    found = kernels.backward(torch.ones_like(y), *p, saved, "silu")
    assert kernels.scratch_bytes() < (p.gate_up.nbytes + p.down.nbytes) / 2
    assert found.gate_up.stride() == p.gate_up.stride()


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_any_shape_equals_the_reference(seed):
    fuzz(seed)
    torch.set_num_threads(1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("tokens", [1, 5, 8, 9, 11, 12, 13, 16, 17, 22, 26, 27, 33, 98, 192, 193, 600])
def test_one_expert_with_any_number_of_tokens(isa, dtype, tokens):
    """Few rows, panels, panels and few rows after them, several blocks of columns and several pieces."""
    p = problem(tokens, 2, 1, 64, 48, dtype=dtype)
    assert too_far(p._replace(ids=torch.zeros(tokens, 1, dtype=torch.int32)), "silu", isa) == {}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
def test_sizes_above_the_blocks(isa, dtype):
    """More rows, columns and depth than one block of each, with remainders."""
    p = problem(300, 2, 1, 550, 530, dtype=dtype)
    assert too_far(p._replace(ids=torch.zeros(300, 1, dtype=torch.int32)), "silu", isa) == {}


@pytest.mark.parametrize("popularity", [(1, 1, 1, 1), (0, 40, 9, 7, 0, 7, 1, 1, 400)])
def test_several_passes(popularity, threads):
    threads(2)
    p = problem(1800, len(popularity), 2, 2048, 8, dtype=torch.float32)
    drawn = torch.tensor(popularity, dtype=torch.float32).expand(1800, -1)
    p = p._replace(ids=torch.multinomial(drawn, 2, generator=torch.Generator().manual_seed(0)))
    assert too_far(p, "silu", ISAS[-1]) == {}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("model", "ffn"), [(2086, 530), (70, 2330)])
def test_few_rows_of_wide_matrices(isa, dtype, model, ffn):
    """Several blocks of columns at a time, more than fit one block of few rows, beside an expert with more rows."""
    p = problem(128, 4, 1, model, ffn, 2, biases=True, dtype=dtype)
    p = p._replace(ids=torch.tensor([0, 1] * 8 + [3, 2] * 15 + [0] * 32 + [2] * 50)[:, None])
    assert too_far(p, "silu", isa) == {}
    few = p._replace(x=p.x[:3], ids=p.ids[:3], weights=p.weights[:3])
    assert too_far(few, "silu", isa) == {}


@pytest.mark.parametrize(
    ("matrices", "activation", "isa", "count"), [(*ffn, ISAS[-1], 2) for ffn in FFNS] + [(2, "silu", "avx2", 1)]
)
def test_many_rows_by_the_vendor_equal_the_reference(matrices, activation, isa, count, threads):
    """Experts with many rows, in one block of sums and in several, beside such with few and some.

    The seed keeps all projections 5e-6 from ReLU's kink, where rounding decides which way the gradient goes.
    """
    threads(count)
    p = problem(1700, 6, 1, 530, 550, matrices, biases=True, seed=1)
    shares = torch.tensor([0.4, 0.0, 0.003, 0.04, 0.2, 0.3])
    ids = torch.multinomial(shares.expand(1700, -1), 1, generator=torch.Generator().manual_seed(0))
    assert too_far(p._replace(ids=ids), activation, isa, vendor_from=550) == {}


def intel_with_mkl() -> bool:
    return torch.backends.mkl.is_available() and "GenuineIntel" in Path("/proc/cpuinfo").read_text()


@pytest.mark.skipif(not intel_with_mkl(), reason="torch without MKL, or another vendor's processor")
@pytest.mark.parametrize(("width", "rows", "forward", "backward"), [(64, 257, 1, 1), (64, 130, 1, 0), (63, 257, 0, 0)])
def test_the_vendor_multiplies_many_rows_of_wide_matrices(width, rows, forward, backward):
    """It adds no rows where our panels of 16 would, and its blocks of sums are larger."""
    p = problem(rows, 1, 1, 32, width)._replace(ids=torch.zeros(rows, 1, dtype=torch.int64))
    kernels, own = CppKernels(vendor_from=64), CppKernels(vendor_from=0)
    exact = rows * 3 * 32 * width
    y, saved = kernels.forward(*p, "silu", True)
    assert (kernels.multiply_adds() == exact) == bool(forward)
    scratch = []
    for k in (kernels, own):
        k.backward(torch.ones_like(y), *p, saved, "silu")
        scratch.append(k.scratch_bytes())
    assert (scratch[0] > scratch[1]) == bool(backward)


def test_gradients_without_experts_are_zero_whatever_the_scratch_held(threads):
    """No thread rounds sums that another one has not cleared yet: a race, so many calls."""
    threads(2)
    kernels, x = CppKernels(), torch.ones(1, 2, 4000, dtype=torch.bfloat16)
    dirty, none = torch.full((3, 2, 4000), 1e30, dtype=x.dtype), torch.empty(0, 2, 4000, dtype=x.dtype)
    dy, here, nowhere = 1e8 * torch.ones(1, 2, 2, dtype=x.dtype), torch.zeros(1, 2).long(), torch.full((1, 2), -1)
    for _ in range(1500):
        kernels.esfk(x, dirty, dy, here, False)
        assert not kernels.esfk(x, none, dy, nowhere, False)[0].any()


@pytest.mark.skipif(not intel_with_mkl(), reason="torch without MKL, or another vendor's processor")
@pytest.mark.parametrize(("width", "rows", "used"), [(4096, 130, True), (4096, 120, False), (4080, 130, False)])
def test_by_default_the_vendor_multiplies_from_4096_columns_on(width, rows, used):
    p = problem(rows, 1, 1, 32, width)._replace(ids=torch.zeros(rows, 1, dtype=torch.int64))
    kernels = CppKernels()
    kernels.forward(*p, "silu", False)
    assert (kernels.multiply_adds() == rows * 3 * 32 * width) == used
    assert too_far(p, "silu", ISAS[-1], vendor_from=VENDOR_FROM) == {}


@pytest.mark.parametrize("dtype", TYPES)
def test_results_do_not_depend_on_the_threads(dtype, threads):
    p = problem(90, 6, 2, 160, 96, dtype=dtype, biases=True)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(everything(CppKernels(), p, "silu", dtype))
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [4, 64])
def test_bfloat16_is_within_twice_the_error_of_torch(isa, tokens):
    p = problem(tokens, 3, 2, 256, 512, biases=True).to(torch.bfloat16)
    kernels = CppKernels(isa)
    want = everything(kernels, p.to(torch.float32), "silu", torch.bfloat16)  # within 1e-5 of float64: see above
    got = everything(kernels, p, "silu", torch.bfloat16)
    usual = p.results("silu", "", torch_path)
    exact = p.to(torch.float64).results("silu", "reference")
    assert error(got["y"], exact["y"]) <= 2 * error(usual["y"], exact["y"])
    names = {"dgate_up": "gate_up", "ddown": "down", "dx": "x", "dweights": "weights", "ddown_bias": "down_bias"}
    for mine, theirs in names.items():
        assert error(got[mine], want[mine]) <= 2 * error(usual[theirs], exact[theirs]), mine


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("where", ["x", "gate_up", "down"])
def test_nan_propagates_to_the_rows_that_meet_it(isa, dtype, where):
    p = problem(40, 3, 1, 32, 32, dtype=dtype)
    p = p._replace(ids=(torch.arange(40) % 3)[:, None])
    poisoned = getattr(p, where)
    poisoned.view(-1)[0] = float("nan")  # token 0, or expert 0
    y, _ = CppKernels(isa).forward(*p, "silu", False)
    met = torch.zeros(40, dtype=torch.bool)
    met[0 if where == "x" else slice(0, None, 3)] = True
    assert torch.equal(y.isnan().any(1), met)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 16), (5, 43), (2048, 8192)])
def test_a_gradient_of_one_row_is_rounded_as_torch_rounds(isa, dtype, outputs, inputs):
    """One product each: to nearest, ties to even, infinities and NaN stay; also in memory that is there already."""
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(1, n, generator=g).to(dtype) for n in (inputs, outputs))
    x[0, :5] = torch.tensor([torch.inf, torch.nan, -torch.inf, 0.0, 1.0 + 2**-7])
    dy[0, :3] = torch.tensor([1.0 + 2**-7, -torch.nan, 1.5])
    want = (dy.float().t() * x.float()).to(dtype)
    for _ in range(2):
        got = CppKernels(isa).estmm(x, dy[:, None], torch.zeros(1, 1, dtype=torch.int64), 1)
        torch.testing.assert_close(got[0], want, rtol=0, atol=0, equal_nan=True)
        del got


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("model", "ffn"), [(1024, 128), (96, 160), (70, 90)])
def test_gradients_in_memory_that_is_there_already(isa, dtype, model, ffn, monkeypatch):
    """Rows that are some half pages long, whole cache lines and neither; experts with few, some, many and no rows."""
    monkeypatch.setattr(memory, "LARGE", 0)
    p = problem(450, 5, 1, model, ffn, 2, dtype=dtype)
    p = p._replace(ids=torch.tensor([0] * 3 + [1] * 40 + [3] * 197 + [4] * 210)[:, None])
    for _ in range(2):
        assert too_far(p, "silu", isa) == {}
    assert memory.gradient(p.down.shape, dtype, p.down.device, [0, 1, 3, 4]).mapped
    memory._free.clear()  # of sizes that nobody else needs


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [-2, 5, 2**31 - 1, -(2**31)])
def test_an_id_out_of_range_is_refused(kind, bad):
    p, kernels = problem(), CppKernels()
    ids = p.ids.to(kind)
    ids[7, 1] = bad
    dy, weight = torch.ones(*ids.shape, 4), torch.ones(5, 4, 16)
    calls = {
        "expert_ffn": lambda: kernels.forward(*p._replace(ids=ids), "silu", False),
        "esmm": lambda: kernels.esmm(p.x, weight, None, ids),
        "esfk": lambda: kernels.esfk(p.x, weight, dy, ids, True),
        "estmm": lambda: kernels.estmm(p.x, dy, ids, 5),
        "ess": lambda: kernels.ess(dy, ids, 5),
    }
    for name, call in calls.items():
        with pytest.raises(MoeplanError, match=f"^{name}: ids: expected -1..4, got {bad}$"):
            call()


def test_other_bad_arguments_are_refused(monkeypatch):
    p, kernels = problem(), CppKernels()
    with pytest.raises(MoeplanError, match=r"x: expected one of .*got torch.float64"):
        kernels.forward(*p.to(torch.float64), "silu", False)
    with pytest.raises(MoeplanError, match="expected weights in a layout of weights_of, got strides"):
        kernels.forward(*p._replace(down=torch.cat([p.down, p.down], 2)[..., :24]), "silu", False)
    monkeypatch.setenv("MOEPLAN_CPU_ISA", "mmx")
    with pytest.raises(MoeplanError, match=r"MOEPLAN_CPU_ISA: expected one of avx2.*got 'mmx'"):
        CppKernels()


def test_rows_that_are_strided_and_ids_that_are_views():
    p = problem(12, 4, 2, 32, 32)
    want, _ = CppKernels().forward(*p, "silu", False)
    wide = torch.zeros(12, 64)
    wide[:, ::2] = p.x
    strided = p._replace(x=wide[:, ::2], ids=p.ids.t().contiguous().t(), weights=p.weights.t().contiguous().t())
    assert torch.equal(CppKernels().forward(*strided, "silu", False)[0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("experts", "top_k", "model", "ffn"), [(32, 4, 512, 512), (64, 6, 512, 384), (64, 1, 256, 1024)]
)
def test_scratch_is_a_tenth_of_padded_dispatch_at_skew(dtype, experts, top_k, model, ffn):
    """Padded: x, gate and up, hidden and result for every expert at the largest count."""
    p = problem(2048, experts, top_k, model, ffn, dtype=dtype)
    popularity = torch.arange(1, experts + 1) ** -1.0
    generator = torch.Generator().manual_seed(0)
    p = p._replace(ids=torch.multinomial(popularity.expand(2048, -1), top_k, generator=generator))
    kernels = CppKernels()
    kernels.forward(*p, "silu", False)
    padded = experts * int(p.ids.flatten().bincount().max()) * (2 * model + 3 * ffn) * dtype.itemsize
    assert kernels.scratch_bytes() <= 0.1 * padded


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_routed_rows_and_of_whole_tiles(isa, dtype, threads):
    """Sizes are whole tiles, so only rows can be added: up to 15 for an expert with over 8 (with AVX2 over 12, with
    over 2 where tiles multiply), none for the others.

    Without matrix tiles, which only bf16 has, up to 6 rows (with AVX2 10) after whole panels of 16 stay rows, where an
    expert has no more than 96.
    """
    threads(2)
    pairs, tiles = isa == "avx512" and dtype is torch.bfloat16, isa == "amx" and dtype is torch.bfloat16
    few, last = (2, 0) if tiles else (12, 10) if isa == "avx2" else (8, 6)
    for tokens, experts in ((0, 4), (6, 40), (90, 15), (300, 7)):
        p = problem(tokens, experts, 2, 64, 96, dtype=dtype)
        kernels = CppKernels(isa)
        shape = p.ids, experts, 2, 96, 64, dtype
        counts = torch.bincount(p.ids.flatten() + 1, minlength=experts + 1)[1:]
        tail = (counts % 16 <= last) & (counts <= 96)
        added = torch.where((counts > few) & ~tail, -counts % 16, 0).sum().item()
        y, saved = kernels.forward(*p, "silu", True)
        each = 2 * 64 * 3 * 96
        assert 2 * kernels.multiply_adds() == counting.count_expert_ffn(*shape).flops + added * each
        kernels.backward(torch.ones_like(y), *p, saved, "silu")
        least = counting.count_expert_ffn_backward(*shape)
        # Matrix tiles take rows 16 at a time and sum over 32, pairs sum over 2; elsewhere the backward adds none.
        tile = 32 if tiles else 2 if pairs else 1
        most = least.flops + counting.count_expert_ffn_backward(*shape, tile=tile).padding
        assert least.flops <= 2 * kernels.multiply_adds() <= most

"""Dense products against torch's in float64, whoever multiplies; who does."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.runtime.kernels import dense, dense_ffn, linear
from moeplan.runtime.kernels.registry import obstacle
from moeplan.spec import MoeplanError
from moeplan.tests.kernel_cpp_cases import isas

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 2**-24, BF16: 2**-8, F16: 2**-11}
WRITTEN = [False, *([True] if obstacle("cpp", "cpu", F32) is None else [])]


@pytest.mark.parametrize("written", WRITTEN)
@given(
    st.sampled_from([F32, BF16, F16]), st.integers(0, 80), st.integers(1, 70), st.integers(1, 70), st.integers(0, 99)
)
@settings(max_examples=200, deadline=None)
def test_linear_equals_torch(written, dtype, rows, outputs, inputs, seed):
    g = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(s, generator=g).to(dtype) for s in ((rows, inputs), (outputs, inputs), (outputs,)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "_outruns_vendor", lambda *_: written)
        for added in (None, bias):
            got = linear(x, weight, added)
            assert (got.dtype, got.shape, got.is_contiguous()) == (dtype, (rows, outputs), True)
            want = F.linear(x.double(), weight.double(), None if added is None else added.double())
            terms = F.linear(x.double().abs(), weight.double().abs(), None if added is None else added.double().abs())
            # Rounded once, or twice by torch: the product, and what the bias makes of it. Sums are float32. Numbers of
            # float16 lie 2 ** -24 apart near zero.
            assert ((got.double() - want).abs() <= (2 * ROUNDING[dtype] + 1e-6) * terms + 2**-24).all()


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [0, 1, 2, 33])
def test_dense_ffn_equals_torch(written, rows, dtype, monkeypatch):
    monkeypatch.setattr(dense, "_outruns_vendor", lambda *_: written)
    g = torch.Generator().manual_seed(0)
    shapes = (rows, 32), (2, 24, 32), (32, 24)
    x, gate_up, down = (torch.randn(s, generator=g).to(dtype) / s[-1] ** 0.5 for s in shapes)
    want = F.linear(F.silu(F.linear(x, gate_up[0])) * F.linear(x, gate_up[1]), down)
    torch.testing.assert_close(
        dense_ffn(x, gate_up, down, activation="silu"),
        want,
        atol=8 * ROUNDING[dtype] + 1e-6,
        rtol=8 * ROUNDING[dtype] + 1e-6,
    )


@pytest.mark.skipif(len(WRITTEN) < 2, reason="no compiler")
def test_who_multiplies(monkeypatch):
    """Large weights and few rows: the C++ kernels, unless another implementation is asked for or the weight strided."""
    seen = []
    monkeypatch.delenv("MOEPLAN_KERNEL", raising=False)
    monkeypatch.setattr(dense, "esmm", lambda x, weight, *_, **__: seen.append(len(x)) or x[:, None])
    x, weight = torch.zeros(2, 1024), torch.zeros(1024, 1024)
    linear(x, weight)
    assert seen == [2]
    linear(x, weight, implementation="grouped")
    linear(x, weight.t())
    linear(x, weight[:512])
    linear(x.double(), weight.double())
    monkeypatch.setenv("MOEPLAN_KERNEL", "reference")
    linear(x, weight)
    assert seen == [2]
    with pytest.raises(MoeplanError, match="implementation: expected one of"):
        linear(x, weight, implementation="fastest")


@pytest.mark.skipif(len(WRITTEN) < 2, reason="no compiler")
def test_halves_of_any_number_of_rows_where_torch_widens_them():
    from moeplan.runtime.kernels.cpp.implementation import CppKernels

    for isa in isas():
        kernels = CppKernels(isa)
        for dtype in (BF16, F16):
            assert kernels.outruns_vendor(4096, 2**20, dtype) == (isa == "avx2")
            assert kernels.outruns_vendor(4096, 2**10, dtype) == (isa == "avx2")
            assert not kernels.outruns_vendor(0, 2**20, dtype)
        assert [n for n in (0, 1, 2, 64, 65) if kernels.outruns_vendor(n, 2**20, F32)] == [2, 64]

"""Dense products against torch's in float64, whoever multiplies; who does."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.runtime.kernels import dense, dense_ffn, linear
from moeplan.runtime.kernels.registry import obstacle
from moeplan.spec import MoeplanError

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
        patch.setattr(dense, "_esmm_is_faster", lambda *_: written)
        for added in (None, bias):
            got = linear(x, weight, added)
            assert (got.dtype, got.shape, got.is_contiguous()) == (dtype, (rows, outputs), True)
            want = F.linear(x.double(), weight.double(), None if added is None else added.double())
            product = F.linear(x.double(), weight.double()).abs()
            terms = F.linear(x.double().abs(), weight.double().abs(), None if added is None else added.double().abs())
            # Rounded once, or twice by torch: the product, and what the bias makes of it. Sums are float32. Numbers of
            # float16 lie 2 ** -24 apart near zero.
            rounding = 1.01 * ROUNDING[dtype] * (product + want.abs())
            assert ((got.double() - want).abs() <= rounding + 1e-6 * terms + 2**-24).all()


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 33])
def test_linear_and_dense_equal_torch(rows, dtype, written, monkeypatch):
    monkeypatch.setattr(dense, "_esmm_is_faster", lambda *_: written)
    g = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=g).to(dtype) for s in ((rows, 32), (48, 32), (48,)))
    got = linear(x, weight, bias)
    assert got.is_contiguous()
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == BF16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got, F.linear(x, weight, bias), **tolerance)
    gate_up, down = weight.view(2, 24, 32) / 6, torch.randn(32, 24, generator=g).to(dtype) / 5
    want = F.linear(F.silu(F.linear(x, gate_up[0])) * F.linear(x, gate_up[1]), down)
    torch.testing.assert_close(dense_ffn(x, gate_up, down, activation="silu"), want, **tolerance)


@pytest.mark.parametrize("outputs", [8, 1024])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-4), (BF16, 2e-2)])
def test_linear_compiles(outputs, dtype, tolerance):
    """In one graph, torch's products and ours, whatever the rows."""
    weight = torch.randn(outputs, 1024).to(dtype)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for rows in (16, 17, 90):
        x = torch.randn(rows, 1024).to(dtype)
        torch.testing.assert_close(compiled(x, weight), linear(x, weight), rtol=tolerance, atol=tolerance)


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


@pytest.mark.parametrize("slow", [True, False])
def test_halves_of_any_number_of_rows_where_torch_multiplies_them_slowly(slow, monkeypatch):
    def faster(rows, values, dtype):
        return dense._esmm_is_faster(torch.empty(rows, 1, dtype=dtype), torch.empty(values, dtype=dtype))

    monkeypatch.setattr(dense, "SLOW_HALVES", slow)
    for dtype in (BF16, F16):
        assert faster(4096, 2**20, dtype) == slow
        assert faster(4096, 2**10, dtype) == slow
        assert faster(1, 2**20, dtype)
        assert not faster(0, 2**20, dtype)
    assert [n for n in (0, 1, 2, 64, 65) if faster(n, 2**20, F32)] == [2, 64]

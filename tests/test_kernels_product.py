"""Products of one expert's rows against float64, with halves as torch multiplies them and widened in pieces."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.runtime.kernels import product

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {F32: 2**-24, BF16: 2**-8, F16: 2**-11}


def near(got, want, terms, rounded=0):
    """Sums in float32, rounded once, before that ``rounded`` perhaps; float16's numbers lie 2 ** -24 apart near 0."""
    assert got.shape == want.shape
    rounding = 1.01 * ROUNDING[got.dtype] * (want.abs() + rounded)
    assert ((got.double() - want).abs() <= rounding + 1e-6 * terms + 2**-24).all()


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@given(
    st.sampled_from([F32, BF16, F16]),
    st.integers(0, 9),
    st.integers(0, 40),
    st.integers(0, 40),
    st.sampled_from([1, 50, 2**20]),
    st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_products_equal_float64(slow, strided, dtype, rows, outputs, inputs, piece, seed):
    g = torch.Generator().manual_seed(seed)
    x, dy, weight, bias = (
        torch.randn(s, generator=g).to(dtype) for s in ((rows, inputs), (rows, outputs), (outputs, inputs), (outputs,))
    )
    columns = x.t().contiguous() if strided else x.t()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "SLOW_HALVES", slow)
        patch.setattr(product, "PIECE", piece)
        forward, with_bias = product.multiply(weight, columns), product.multiply(weight, columns, bias)
        back, gradient = product.multiply_back(dy, weight), torch.full_like(weight, torch.nan)
        product.multiply_rows(dy, x, gradient)
    assert forward.dtype == with_bias.dtype == dtype
    assert back.dtype == F32
    x, dy, weight, bias = x.double(), dy.double(), weight.double(), bias.double()
    want, terms = weight @ x.t(), weight.abs() @ x.t().abs()
    near(forward, want, terms)
    near(with_bias, want + bias[:, None], terms + bias.abs()[:, None], 0 if slow else want.abs())
    near(gradient, dy.t() @ x, dy.t().abs() @ x.abs())
    # Where torch multiplies halves its product is rounded to them before.
    near(back if slow else back.to(dtype), dy @ weight, dy.abs() @ weight.abs())


def test_widened_halves_are_not_rounded_on_the_way_back(monkeypatch):
    """The gradient that goes on is float32."""
    monkeypatch.setattr(product, "SLOW_HALVES", True)
    dy, weight = torch.tensor([[1.0, 2**-12]], dtype=BF16), torch.ones(2, 1, dtype=BF16)
    assert product.multiply_back(dy, weight).item() == 1 + 2**-12


def test_float64_stays(monkeypatch):
    monkeypatch.setattr(product, "SLOW_HALVES", True)
    dy, weight = torch.ones(2, 3, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    assert product.multiply_back(dy, weight).dtype == product.multiply(weight, dy.new_ones(4, 2)).dtype == torch.float64

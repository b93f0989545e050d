"""Every implementation of the expert FFN against the definition, forward and backward; bad input; who is chosen."""

import functools
import logging
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.runtime.kernels import expert_ffn, implementations, memory, registry
from moeplan.spec import MoeplanError
from moeplan.tests.kernel_cases import FFNS, available, error, problem, torch_path

torch.set_num_threads(1)

HERE = available()
EVERY = [(name, dtype) for dtype in (torch.float32, torch.float64) for name in available(dtype)]


def definition(p, activation):
    """y[t] = sum over k of weights[t, k] * FFN_{ids[t, k]}(x[t]), token by token, in float64."""
    p = p.to(torch.float64)
    y = torch.zeros_like(p.x)
    for t in range(len(p.x)):
        one = p._replace(x=p.x[t : t + 1], ids=p.ids[t : t + 1], weights=p.weights[t : t + 1])
        y[t] = torch_path(one, activation, "")[0]
    return y


@pytest.mark.parametrize(("name", "dtype"), EVERY)
@pytest.mark.parametrize(("matrices", "activation"), FFNS)
@pytest.mark.parametrize("biases", [False, True])
def test_equals_the_definition(name, dtype, matrices, activation, biases):
    p = problem(matrices=matrices, dtype=dtype, biases=biases)
    got, want = p.run(activation, name), definition(p, activation)
    assert got.dtype == dtype
    assert error(got, want) < (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(("matrices", "activation"), [*FFNS, (1, "silu"), (1, "gelu"), (2, "relu")])
@pytest.mark.parametrize("biases", [False, True])
def test_float32_is_within_1e_5(name, matrices, activation, biases):
    p = problem(33, 5, 3, 40, 56, matrices, biases=biases)
    if activation == "swiglu_clamped":
        p = p._replace(x=4 * p.x)  # reaches the clamps
    want = p.to(torch.float64).results(activation, "reference")
    got = p.results(activation, name)
    assert {part: e for part in want if (e := error(got[part], want[part])) > 1e-5} == {}


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("matrices", "activation"), FFNS)
def test_low_precision_is_within_twice_the_error_of_torch(name, dtype, matrices, activation):
    p = problem(48, 4, 2, 64, 96, matrices, biases=True).to(dtype)
    want = p.to(torch.float64).results(activation, "reference")
    usual = p.results(activation, "", torch_path)
    got = p.results(activation, name)
    over = {part: (error(got[part], want[part]), error(usual[part], want[part])) for part in want}
    assert {part: pair for part, pair in over.items() if pair[0] > 2 * pair[1]} == {}
    assert all(got[part].dtype == usual[part].dtype for part in want)


@pytest.mark.parametrize("name", HERE)
@settings(max_examples=40)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(0, 6),
    top_k=st.integers(0, 5),
    model=st.integers(1, 40),
    ffn=st.integers(0, 40),
    ffn_kind=st.sampled_from(FFNS),
    biases=st.booleans(),
    small_ids=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(name, tokens, experts, top_k, model, ffn, ffn_kind, biases, small_ids, seed):
    matrices, activation = ffn_kind
    p = problem(tokens, experts, top_k, model, ffn, matrices, biases=biases, seed=seed)
    p = p._replace(ids=p.ids.int()) if small_ids else p
    want = p.to(torch.float64).results(activation, "reference")
    got = p.results(activation, name)
    # A sum over few terms may nearly cancel: what is small beside the rest is let be small.
    assert {part: e for part in want if (e := error(got[part], want[part])) > 2e-5} == {}


@pytest.mark.parametrize("name", HERE)
def test_no_expert_here_gives_zeros(name):
    p = problem(biases=True)
    nobody = p._replace(ids=torch.full_like(p.ids, -1))
    assert all(not value.any() for value in nobody.results("silu", name).values())
    none = nobody._replace(
        gate_up=p.gate_up[:0], down=p.down[:0], gate_up_bias=p.gate_up_bias[:0], down_bias=p.down_bias[:0]
    )
    assert not none.run("silu", name).any()


@pytest.mark.parametrize("name", HERE)
def test_sums_in_float32(name):
    """Many small contributions in bf16: a bf16 sum would lose them."""
    experts = 64
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    gate_up, down = torch.ones(experts, 1, 1, 1, dtype=torch.bfloat16), torch.ones(experts, 1, 1, dtype=torch.bfloat16)
    weights = torch.full((1, experts), 1 / 512)
    weights[0, 0] = 1.0
    ids = torch.arange(experts)[None]
    got = expert_ffn(x, gate_up, down, ids, weights, activation="relu", implementation=name)
    assert got.item() == torch.tensor(1 + 63 / 512).bfloat16().item() != 1.0


@pytest.mark.parametrize("name", HERE)
def test_strided_activations_are_taken(name):
    p = problem()
    wide = torch.randn(len(p.x), 2 * p.x.shape[1])
    strided = p._replace(
        x=wide[:, ::2], ids=p.ids.t().contiguous().t(), weights=p.weights.repeat_interleave(2, 1)[:, ::2]
    )
    want = strided._replace(x=strided.x.contiguous()).run("silu", "reference")
    torch.testing.assert_close(strided.run("silu", name), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ffn", [1, memory.LARGE // 16, memory.LARGE // 16 + 1])
def test_gradients_have_memory_of_their_own_and_zeros_for_idle_experts(ffn):
    cpu = torch.device("cpu")
    for experts in ([0, 2], [1], [], [0, 1, 2, 3], [3]):  # the later ones in memory of the earlier
        one, other = (memory.gradient((4, ffn), torch.float32, cpu, experts).tensor for _ in range(2))
        idle = [e for e in range(4) if e not in experts]
        assert (one.shape, one.dtype, one.is_contiguous()) == ((4, ffn), torch.float32, True)
        assert not one[idle].any()
        one.fill_(1.0)
        assert not other[idle].any()
        assert one.sum().item() == 4 * ffn
        del one, other


@given(
    st.integers(1, 40),
    st.integers(0, 3 * memory.HUGE_PAGE // 4),
    st.lists(st.sets(st.integers(0, 39)), min_size=2, max_size=4),
)
@settings(max_examples=30, deadline=None)
def test_idle_experts_have_zeros_wherever_large_pages_end(experts, more, busy):
    columns = memory.LARGE // 4 // experts + 1 + more // experts
    for wanted in busy:  # each in memory that the one before it filled, large pages shared between experts
        here = {e for e in wanted if e < experts}
        buffer = memory.gradient((experts, columns), torch.float32, torch.device("cpu"), here)
        assert not buffer.tensor[[e for e in range(experts) if e not in here]].any()
        buffer.tensor.fill_(1.0)
        del buffer
    memory._free.clear()  # many sizes


def test_memory_is_used_again_once_nobody_holds_it():
    make = functools.partial(memory.empty, (memory.LARGE // 4, 3), torch.float32, torch.device("cpu"))
    first, second = make(), make()
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2
    view = first[5:]
    del first, second
    third = make()
    assert third.data_ptr() != view.data_ptr() - 5 * 12  # a view still holds the first
    del view, third
    assert {t.data_ptr() for t in (make(), make())} <= places


def test_memory_that_is_not_there_is_named():
    for make in (memory.empty, functools.partial(memory.gradient, experts=[0])):
        with pytest.raises(MoeplanError, match=r"out of memory: expected .* GiB for gradients .*use fewer tokens"):
            make((2**20, 2**30), torch.float32, torch.device("cpu"))


def test_tensors_of_many_sizes_leave_few_mappings_behind():
    def free():
        return sum(len(waiting) for waiting in memory._free.values())

    before = free()
    for more in range(100):
        rows = memory.LARGE // 256 + 997 * more
        held = memory.empty((rows, 64), torch.float32, torch.device("cpu"))
        assert held.shape == (rows, 64)
        held[-1] = 1.0
        del held
    assert free() - before <= 8


def test_wrong_arguments_are_named():
    p = problem(biases=True)
    x, gate_up, gate_up_bias, down, down_bias, ids, weights = p
    nan = weights.clone()
    nan[3, 1] = torch.nan
    cases = [
        ("x", r"\[tokens, model\], got torch.float32 \[16\]", p._replace(x=x[0])),
        ("x", r"floating .* got torch.int64 \[13, 16\]", p._replace(x=x.long())),
        ("gate_up", r"\[experts, 1 or 2, ffn, 16\]", p._replace(gate_up=gate_up[..., :5])),
        ("gate_up", "got torch.bfloat16", p._replace(gate_up=gate_up.bfloat16())),
        ("gate_up", r"contiguous \[5, 2, 23, 16\], .*got strides \[768, 384, 16, 1\]", _narrow(p, 23)),
        ("down", r"expected torch.float32 \[5, 16, 24\], got", p._replace(down=down[:4])),
        ("down", "expected contiguous", p._replace(down=torch.cat([down, down], 2)[..., :24])),
        (
            "gate_up_bias",
            r"\[5, 2, 24\], got torch.float32 \[5, 48\]",
            p._replace(gate_up_bias=gate_up_bias.flatten(1)),
        ),
        ("down_bias", r"\[5, 16\], got torch.float16", p._replace(down_bias=down_bias.half())),
        ("ids", "int32 or int64", p._replace(ids=ids.float())),
        ("ids", r"\[13, top_k\]", p._replace(ids=ids[1:])),
        ("weights", r"float32 \[13, 3\]", p._replace(weights=weights[:, 1:])),
        ("weights", "got torch.bfloat16", p._replace(weights=weights.bfloat16())),
        ("weights", "got torch.float64", p._replace(weights=weights.double())),
        ("weights", "expected numbers, got NaN", p._replace(weights=nan)),
        ("ids", "expected on cpu, got on meta", p._replace(ids=ids.to("meta"))),
        ("down", "expected on cpu, got on meta", p._replace(down=down.to("meta"))),
    ]
    for name, message, wrong in cases:
        with pytest.raises(MoeplanError, match=f"^expert_ffn: {name}: .*{message}") as caught:
            wrong.run("silu", "reference")
        assert "\n" not in str(caught.value)
    with pytest.raises(MoeplanError, match=r"activation: expected one of .*'silu'.*got 'tanh'"):
        p.run("tanh", "reference")
    with pytest.raises(MoeplanError, match=r"activation: expected gate and up for 'swiglu_clamped', got 1 matrix"):
        problem(matrices=1).run("swiglu_clamped", "reference")


def _narrow(p, columns):
    """A view of the first columns of each expert, as a careless sharding would hand it on."""
    return p._replace(
        gate_up=p.gate_up[:, :, :columns],
        gate_up_bias=p.gate_up_bias[:, :, :columns].contiguous(),
        down=p.down[:, :, :columns].contiguous(),
    )


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("wrong", [5, -2, 2**31 - 1, -(2**31)])
def test_ids_out_of_range_are_refused(name, wrong):
    p = problem()
    ids = p.ids.clone()
    ids[7, 2] = wrong
    for kind in (torch.int32, torch.int64):
        with pytest.raises(MoeplanError, match=rf"^expert_ffn: ids: expected -1..4, got {wrong}$"):
            p._replace(ids=ids.to(kind)).run("silu", name)


def test_implementations_are_chosen_by_argument_then_environment(monkeypatch):
    assert implementations() == ("reference", "grouped", "cpp", "triton")
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    assert registry.choose(None, "cpu", torch.float64) == registry.choose(None, "cuda", torch.float64) == "grouped"
    assert registry.choose(None, "cpu", torch.bfloat16) == ("cpp" if "cpp" in HERE else "grouped")
    monkeypatch.setenv(registry.ENVIRONMENT, "reference")
    assert registry.choose(None, "cpu", torch.float32) == "reference"
    assert registry.choose("grouped", "cpu", torch.float32) == "grouped"
    monkeypatch.setenv(registry.ENVIRONMENT, "magic")
    with pytest.raises(MoeplanError, match="expected one of reference, grouped, cpp, triton, got 'magic'"):
        registry.choose(None, "cpu", torch.float32)
    refused = [
        ("cpp", "cpu", torch.float64, "computes in float32, bfloat16, float16, not torch.float64"),
        ("cpp", "cuda", torch.float32, "runs on CPUs, the tensors are on cuda"),
        ("triton", "cpu", torch.float32, "runs on GPUs, the tensors are on cpu|expected a CUDA device|package triton"),
    ]
    for name, device, dtype, reason in refused:
        with pytest.raises(MoeplanError, match=f"'{name}' cannot run here: .*({reason})"):
            registry.choose(name, device, dtype)


def test_a_fallback_is_said_once(monkeypatch, caplog):
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    monkeypatch.setattr(registry, "obstacle", lambda name, device, dtype: "no compiler was found")
    registry._default.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "moeplan.kernels"):
            assert [registry.choose(None, "cpu", torch.float32) for _ in range(3)] == ["grouped"] * 3
    finally:
        registry._default.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [
        "moeplan: kernels: 'grouped' (vendor products) runs instead of 'cpp': no compiler was found"
    ]


def test_importing_the_kernels_loads_no_implementation():
    code = "import sys, moeplan.runtime.kernels; print(*(n for n in sys.modules if 'runtime.kernels.' in n))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = {name.removeprefix("moeplan.runtime.kernels.").split(".")[0] for name in done.stdout.split()}
    assert "registry" in loaded
    assert not loaded & {"reference", "grouped", "cpp", "gpu"}

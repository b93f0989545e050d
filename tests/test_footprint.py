"""Bytes of served models, beside what engines and papers say of them; and that a division only divides."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.serving_search.footprint import GIB, Division, Sizes, Step
from moeplan.planner.serving_search.precision import in_precision, precision_of
from moeplan.spec.catalogue import load_model
from moeplan.spec.errors import MoeplanError


def tensor(tp: int) -> Division:
    return Division(tp, 1, tp, 1)


# Logs of engines: what one GPU's weights take. github.com/vllm-project/vllm: issue 17469 (Qwen3-30B-A3B, four GPUs),
# 18446 (Qwen3-235B-A22B, eight), 33155 (gpt-oss-120b, one, Triton backend); github.com/HabanaAI/vllm-fork issue 809
# (DeepSeek-R1 in fp8 on eight devices).
WEIGHTS = [
    ("qwen3-30b-a3b", None, 4, 14.2474),
    ("qwen3-235b-a22b", None, 8, 54.9206),
    ("gpt-oss-120b", None, 1, 64.38),
    ("deepseek-v3", None, 8, 79.41),
]


@pytest.mark.parametrize(("name", "precision", "tp", "gib"), WEIGHTS)
def test_weights_as_engines_log_them(name: str, precision: None, tp: int, gib: float) -> None:
    model = in_precision(load_model(name), precision)
    (found,) = Sizes(model).footprints(tensor(tp), (len(model.layers),), 0, 1, Step(8192, 256))
    assert found.weights / GIB == pytest.approx(gib, rel=0.01)


# The same with everything but the cache. vllm issue 21348: Qwen3-235B-A22B in fp8 on four H100 (79.19 GiB, of which 0.9
# may be used) leaves 8.11 GiB for the cache. vllm issue 23278: gpt-oss-120b on one H100 lacks 2.14 GiB.
TOTALS = [("qwen3-235b-a22b", "fp8", 4, 0.9 * 79.19 - 8.11), ("gpt-oss-120b", None, 1, 0.9 * 79.19 + 2.14)]


@pytest.mark.parametrize(("name", "precision", "tp", "gib"), TOTALS)
def test_all_but_the_cache_as_engines_log_it(name: str, precision, tp: int, gib: float) -> None:  # type: ignore[no-untyped-def]
    model = in_precision(load_model(name), precision)
    (found,) = Sizes(model).footprints(tensor(tp), (len(model.layers),), 0, 1, Step(8192, 1024))
    assert found.total / GIB == pytest.approx(gib, rel=0.10)


def test_cache_as_published() -> None:
    """DeepSeek-V3: 70.272 KB a token (arXiv 2505.09343, table 1). Qwen3-235B-A22B on four GPUs: 8.11 GiB hold 178,880
    tokens in vLLM, 2 x 8.23 GB hold 367,404 in SGLang (vllm issue 21348)."""
    v3 = Sizes(load_model("deepseek-v3")).layer_cache(tensor(8), 64).sum() / 64
    assert v3 == pytest.approx(70_272, rel=0.01)
    qwen = Sizes(load_model("qwen3-235b-a22b")).layer_cache(tensor(4), 64).sum() / 64
    assert qwen == pytest.approx(8.11 * GIB / 178_880, rel=0.02)
    assert qwen == pytest.approx(2 * 8.23 * GIB / 367_404, rel=0.02)


def test_a_window_holds_no_more_than_itself() -> None:
    """gpt-oss: every other layer attends to 128 tokens."""
    each = Sizes(load_model("gpt-oss-20b")).layer_cache(tensor(1), 8192)
    assert sorted(set((each / each.max()).tolist())) == [128 / 8192, 1.0]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b", "mixtral"]),
    st.sampled_from([None, "bf16", "fp8", "fp4"]),
    st.sampled_from([(1, 1), (2, 1), (4, 1), (8, 1), (2, 4), (1, 8)]),
    st.integers(0, 3),
)
def test_all_ranks_together_hold_all_weights(name, precision, attention, power) -> None:  # type: ignore[no-untyped-def]
    """No division loses a weight; and one that divides nothing holds what the model stores."""
    model = in_precision(load_model(name), precision)
    tp, dp = attention
    moe_ep = min(2**power, tp * dp)
    division = Division(tp, dp, tp * dp // moe_ep, moe_ep)
    sizes, step = Sizes(model), Step(64, 1)
    (one,) = sizes.footprints(division, (len(model.layers),), 0, 1, step)
    assert one.weights * tp * dp >= 0.999 * model.weight_bytes()
    (whole,) = sizes.footprints(tensor(1), (len(model.layers),), 0, 1, step)
    padded = 1.15 if name.startswith("gpt-oss") and precision in (None, "fp4") else 1.001
    assert model.weight_bytes() * 0.999 <= whole.weights <= model.weight_bytes() * padded
    assert one.weights <= whole.weights


def test_stages_divide_the_model() -> None:
    model = load_model("mixtral")
    sizes, step = Sizes(model), Step(64, 1)
    (whole,) = sizes.footprints(tensor(2), (32,), 16, 2048, step)
    stages = sizes.footprints(tensor(2), (10, 22), 16, 2048, step)
    assert sum(stage.weights for stage in stages) == whole.weights
    assert sum(stage.cache for stage in stages) == whole.cache
    assert np.isclose(stages[1].cache / stages[0].cache, 2.2)


def test_precision_by_name() -> None:
    assert [precision_of(load_model(n)) for n in ("mixtral", "deepseek-v3", "gpt-oss-20b")] == ["bf16", "fp8", "fp4"]
    odd = load_model("gpt-oss-20b")
    block = odd.blocks[0]
    assert block.moe is not None
    assert block.moe.storage is not None
    storage = block.moe.storage.model_copy(update={"name": "ternary"})
    changed = [b.model_copy(update={"moe": b.moe.model_copy(update={"storage": storage})}) for b in odd.blocks if b.moe]
    with pytest.raises(MoeplanError, match=r"ternary.*--precision"):
        precision_of(odd.model_copy(update={"blocks": tuple(changed)}))

"""Predictions from small tables that are made up here, whose sums are known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from moeplan.planner.serving import Architecture, Degrees, Load, Settings, StepTimes, of_config, of_model, predict, step
from moeplan.planner.serving.architecture import Layers, Mixer
from moeplan.planner.serving.capacity import cached_tokens, weight_bytes
from moeplan.planner.serving.layers import formats
from moeplan.planner.serving.lookup import COPY_SHARE, HALF_BYTES, LAUNCH_SECONDS, Lookup
from moeplan.spec.catalogue import catalogue
from moeplan.spec.errors import InfeasibleError, MoeplanError
from moeplan.spec.tabled import Origin, System, Table

HIDDEN, EXPERTS, TOP_K, FFN, VOCAB = 1024, 64, 4, 512, 32000
CALL = 1e-5
MEMORY = 4e12
MODEL = Architecture("small", HIDDEN, VOCAB, (Layers(3, Mixer("gqa", 16, 8, 64), FFN, EXPERTS, TOP_K),))
CONFIG = {
    "num_hidden_layers": 3,
    "hidden_size": HIDDEN,
    "vocab_size": VOCAB,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": FFN,
}


def rows(axes: dict[str, list[float]], seconds: object = None, **constant: object) -> pd.DataFrame:
    """All combinations of ``axes``; each takes ``CALL``, or what ``seconds`` says of its row."""
    frame = pd.MultiIndex.from_product(axes.values(), names=axes).to_frame(index=False).assign(**constant)
    frame["seconds"] = CALL if seconds is None else seconds(frame)  # type: ignore[operator]
    return frame if "kernel" in frame else frame.assign(kernel="one")


class Small:
    """Tables in which every call takes 10 us, but for what a test replaces."""

    def __init__(self, memory: float = 80e9, **frames: pd.DataFrame) -> None:
        tokens = [1.0, 8, 64, 512, 4096, 32768]
        lengths = [1.0, 64, 1024, 16384]
        heads = [1, 2, 4, 8, 16]
        attention = {"heads": heads, "kv_heads": [1, 2, 4, 8], "batch": [1, 8, 64, 512]}
        kept = {"head_dim": 64, "window": 0, "kv_dtype": "bfloat16"}
        whole = {"kernel": ["one_eager", "one_graph"], "gpus": [2, 4, 8], "bytes": [256.0, 1e6, 1e9]}
        self.memory = memory
        self.frames = {
            "gemm": rows({"n": [32, 1024, 65536], "k": [128, 65536], "m": tokens}, dtype="bfloat16"),
            "moe": rows(
                {"tp": [1, 2, 4], "ep": [1, 2, 4], "tokens": tokens},
                dtype="bfloat16",
                routing="power_law_1.01",
                hidden=HIDDEN,
                ffn=FFN,
                top_k=TOP_K,
                experts=EXPERTS,
            ),
            "context_attention": rows({**attention, "new_tokens": lengths}, **kept),
            "generation_attention": rows({**attention, "past_tokens": lengths}, **kept),
            "all_reduce": rows(whole),
            "nccl": rows(
                {"collective": ["all_reduce", "all_gather", "reduce_scatter"], "gpus": [2, 4, 8], "bytes": [1.0, 1e9]},
                dtype="half",
            ),
        } | frames

    def system(self, name: str) -> System:
        return System(name, "test", self.memory, MEMORY, {}, 1e11, 1e10, 1e10, 8)

    def table(self, operator: str, system: str, engine: str, version: str | None = None) -> Table:
        if operator not in self.frames:
            raise MoeplanError(f"{operator}: no such table")
        return Table(operator, system, engine, "1.0", self.frames[operator], Origin("measured", "made up"))


def times(tables: Small, degrees: Degrees, settings: Settings) -> StepTimes:
    return StepTimes(Lookup(tables, "gpu", "vllm"), MODEL, "bf16", degrees, settings, "power_law_1.01")  # type: ignore[arg-type]


PLAIN = Settings("mixed", 4096, graph_tokens=32768)


def test_a_decode_step_is_the_sum_of_its_calls() -> None:
    """Counted by hand: 3 layers of 2 projections, attention, router and experts; small kernels; the output."""

    def small(values: float) -> float:
        return LAUNCH_SECONDS + values / (MEMORY * COPY_SHARE)

    batch = 8
    norms = 2 * small(4 * batch * HIDDEN * HALF_BYTES)
    q, kv = 16 * 64, 8 * 64
    rotated = small(2 * batch * (q + 2 * kv) * HALF_BYTES) + small(4 * batch * kv * HALF_BYTES)
    routed = 2 * small(batch * EXPERTS * 4)
    output = CALL + small(batch * HIDDEN * HALF_BYTES) + 2 * small(batch * VOCAB * 4)
    expected = 3 * (5 * CALL + norms + rotated + routed) + output
    assert times(Small(), Degrees(), PLAIN).seconds(batch, 100, 0, 0, 0) == pytest.approx(expected, rel=1e-9)
    found = step(Small(), "gpu", "vllm", None, MODEL, "bf16", Degrees(), decodes=batch, context=100, settings=PLAIN)  # type: ignore[arg-type]
    assert found == pytest.approx(expected, rel=1e-9)


def test_ranks_that_share_heads_exchange_twice_a_layer() -> None:
    alone = times(Small(), Degrees(), replace(PLAIN, fused=False)).parts(8, 100)
    shared = times(Small(), Degrees(2, moe_tp=2), replace(PLAIN, fused=False)).parts(8, 100)
    assert alone.parts["exchange"] == 0
    assert shared.parts["exchange"] == pytest.approx(3 * 2 * CALL)
    fused = times(Small(), Degrees(2, moe_tp=2), PLAIN).parts(8, 100)
    assert fused.parts["small"] < shared.parts["small"]


def test_attention_copies_gather_and_scatter() -> None:
    found = times(Small(), Degrees(1, dp=4, moe_ep=4), PLAIN).parts(32, 100)
    assert found.parts["exchange"] == pytest.approx(3 * 2 * CALL)


def grown(frame: pd.DataFrame) -> pd.Series:
    return CALL + 1e-8 * frame["tokens"]


def test_more_work_never_takes_less() -> None:
    tables = Small()
    tables.frames["moe"]["seconds"] = grown(tables.frames["moe"])
    found = times(tables, Degrees(), PLAIN)
    decodes = [found.seconds(batch, 500, 0, 0, 0) for batch in (1, 2, 3, 5, 8, 13, 64, 200)]
    assert decodes == sorted(decodes)
    prompts = [found.seconds(4, 500, 1, tokens, 0) for tokens in (1, 30, 100, 1000, 3000)]
    assert prompts == sorted(prompts)


def test_a_step_with_prompts_waits_for_the_host() -> None:
    slow = Small()
    eager = slow.frames["all_reduce"]["kernel"] == "one_eager"
    slow.frames["all_reduce"].loc[eager, "seconds"] = CALL + 2e-5
    launched = times(slow, Degrees(), replace(PLAIN, graph_tokens=0, calls=50)).seconds(0, 0, 1, 64, 0)
    assert launched == pytest.approx(3 * 50 * 2e-5)
    assert times(slow, Degrees(), PLAIN).seconds(0, 0, 1, 64, 0) < launched


def test_predicts_a_load_and_says_from_what() -> None:
    served = predict(Small(), "gpu", "vllm", None, MODEL, "bf16", Degrees(2, moe_tp=2), Load(256, 64, 8, 0.8, 3), PLAIN)  # type: ignore[arg-type]
    assert served.tpot_s > served.parts["experts"] > 0
    assert served.ttft_s > 0
    assert served.tokens_per_s_per_gpu > 0
    assert "moe: vllm 1.0, measured" in served.origins


def test_what_stands_in_is_noted() -> None:
    tables = Small()
    frame = tables.frames["moe"]
    tables.frames["moe"] = frame[(frame.tp == 1)]
    served = predict(tables, "gpu", "vllm", None, MODEL, "bf16", Degrees(2, moe_tp=2), Load(64, 16, 2), PLAIN)  # type: ignore[arg-type]
    assert any("no rows, taken from ep 2" in note for note in served.notes)
    wide = predict(Small(), "gpu", "vllm", None, MODEL, "bf16", Degrees(), Load(40000, 4, 1), PLAIN)  # type: ignore[arg-type]
    assert any("outside the measured sizes" in note for note in wide.notes)


def test_no_rows_is_one_line() -> None:
    with pytest.raises(MoeplanError, match=r"no measured rows of gemm with dtype fp8_block") as caught:
        predict(Small(), "gpu", "vllm", None, MODEL, "fp8", Degrees(), Load(64, 16, 2), PLAIN)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(InfeasibleError, match="the weights leave room for 0 of 80 tokens"):
        predict(Small(memory=4e9), "gpu", "vllm", None, MODEL, "bf16", Degrees(), Load(64, 16, 2), PLAIN)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Degrees(2, dp=2, moe_ep=2), r"tp\(2\) \* dp\(2\) != moe_tp\(1\) \* moe_ep\(2\)"),
        (lambda: Degrees(0), "degree tp: 0"),
        (lambda: Load(0, 2, 1), "isl must be"),
        (lambda: Load(8, 8, 1, 1.5), "shortest must be"),
        (lambda: step(Small(), "gpu", "vllm", None, MODEL, "bf16", Degrees()), "needs sequences"),  # type: ignore[arg-type]
        (lambda: of_config({"num_hidden_layers": 2}, "half"), "model half: its configuration lacks"),
        (lambda: of_model(catalogue()["swin-moe-small"]), "swin-moe-small: its layers are known by size only"),
        (lambda: predict(Small(), "gpu", "llama.cpp", None, MODEL, "bf16", Degrees(), Load(8, 8, 1)), "engine llama"),  # type: ignore[arg-type]
        (lambda: formats("fp7", MODEL), "precision fp7"),
    ],
)
def test_wrong_questions(make: object, said: str) -> None:
    with pytest.raises(MoeplanError, match=said):
        make()  # type: ignore[operator]


def test_a_configuration_is_read() -> None:
    assert of_config(CONFIG, "small") == MODEL
    assert of_config({"text_config": CONFIG}, "small") == MODEL


def test_the_catalogue_is_read() -> None:
    """Sizes of two published models, counted from their papers."""
    oss = of_model(catalogue()["gpt-oss-120b"])
    assert oss.experts_format == "mxfp4"
    assert sorted((layers.count, layers.mixer.window) for layers in oss.layers) == [(18, 0), (18, 128)]
    deep = of_model(catalogue()["deepseek-v3"])
    assert [(layers.count, layers.experts, layers.shared) for layers in deep.layers] == [(3, 0, 0), (58, 256, 2048)]


@pytest.mark.parametrize("name", ["qwen3-235b-a22b", "mixtral", "deepseek-v3"])
def test_weights_are_those_of_the_document(name: str) -> None:
    """The planner's own count of the same model, made elsewhere, differs by norms and biases only."""
    model = catalogue()[name]
    counted = weight_bytes(of_model(model), formats("bf16", of_model(model)), Degrees())
    assert counted == pytest.approx(2 * model.total_parameters(), rel=0.002)


def test_cached_tokens() -> None:
    """1 GB is left of this memory; a token keeps 3 layers of 2 * 8 heads of 64 values of 2 bytes."""
    kept = formats("bf16", MODEL)
    memory = (weight_bytes(MODEL, kept, Degrees()) + 4e9 + 1e9) / 0.9
    tokens = cached_tokens(MODEL, kept, Degrees(), PLAIN, memory)
    assert tokens == pytest.approx(1e9 / (3 * 2 * 8 * 64 * 2))
    assert np.isclose(cached_tokens(MODEL, kept, Degrees(), replace(PLAIN, kv_cache="fp8"), memory), 2 * tokens)

"""Routing of a step: from a trace or assumed; and which copy of an expert serves a token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.spec.catalogue import load_model
from moeplan.spec.errors import MoeplanError
from moeplan.spec.routing import (
    COPY_PHASES,
    COPY_STEP,
    assumed_routing,
    check_shape,
    copy_table,
    draw_routing,
    traced_routing,
)
from moeplan.spec.trace import Trace
from moeplan.spec.workload import Workload

MODEL = load_model("tiny-moe")
LAYERS, EXPERTS, TOP_K = 8, 16, 2


def numbered_trace(lengths: list[int]) -> Trace:
    """A trace in which the gate weights tell the row: token t has weights (t + 1, 0)."""
    tokens = sum(lengths)
    rng = np.random.default_rng(0)
    ids = rng.random((tokens, LAYERS, EXPERTS)).argsort(2)[:, :, :TOP_K]
    weights = np.zeros(ids.shape, np.float32)
    weights[:, :, 0] = np.arange(1, tokens + 1)[:, None]
    return Trace.of(ids, EXPERTS, expert_weights=weights, seq_len=np.array(lengths))


def rows(routing_weights: np.ndarray) -> np.ndarray:
    return routing_weights[:, 0, 0].astype(int) - 1


def valid(ids: np.ndarray, tokens: int) -> bool:
    distinct = all(len(set(row)) == TOP_K for row in ids.reshape(-1, TOP_K).tolist())
    return ids.shape == (tokens, LAYERS, TOP_K) and ids.min() >= 0 and ids.max() < EXPERTS and distinct


def test_shape_must_fit_the_model() -> None:
    trace = numbered_trace([4])
    check_shape(trace, MODEL)
    with pytest.raises(MoeplanError, match=r"t\.npz: has 8 layers x 16 experts, top-2; mixtral has 32 x 8, top-2"):
        check_shape(trace, load_model("mixtral"), "t.npz")
    check_shape(Trace.of_counts(np.ones((LAYERS, EXPERTS))), MODEL)
    with pytest.raises(MoeplanError, match="has 8 layers x 9 experts"):
        check_shape(Trace.of_counts(np.ones((LAYERS, 9))), MODEL)


def test_prefill_takes_the_beginning_of_different_sequences() -> None:
    trace = numbered_trace([10, 10, 10])
    routing = traced_routing(trace, Workload.from_text("prefill:24@8"), seed=1)
    taken = rows(routing.expert_weights).reshape(3, 8)
    assert sorted(taken[:, 0]) == [0, 10, 20]
    assert (np.diff(taken, axis=1) == 1).all()
    np.testing.assert_array_equal(routing.expert_ids, trace.expert_ids[taken.ravel()])


def test_prefill_goes_on_into_the_next_sequence_and_around_the_end() -> None:
    trace = numbered_trace([2, 3])
    taken = rows(traced_routing(trace, Workload.from_text("prefill:16@8"), seed=0).expert_weights).reshape(2, 8)
    assert {int(start) for start in taken[:, 0]} == {0, 2}
    assert (np.diff(taken, axis=1) % 5 == 1).all()


def test_decode_takes_one_row_of_every_sequence() -> None:
    trace = numbered_trace([5, 5, 5, 5])
    taken = rows(traced_routing(trace, Workload.from_text("decode:8"), seed=3).expert_weights)
    assert sorted(taken // 5) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_seed_decides() -> None:
    workload = Workload.from_text("decode:16")
    for trace in (None, numbered_trace([50, 50])):
        a, b, c = (draw_routing(trace, MODEL, workload, seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(a.expert_ids, b.expert_ids)
        assert (a.expert_ids != c.expert_ids).any()


def test_assumed_routing_is_valid_skewed_and_sums_to_one() -> None:
    routing = draw_routing(None, MODEL, Workload.from_text("prefill:2048"), seed=0)
    assert valid(routing.expert_ids, 2048)
    np.testing.assert_allclose(routing.expert_weights.sum(2), 1, rtol=1e-6)
    counts = routing.counts(EXPERTS)
    assert counts.shape == (LAYERS, EXPERTS)
    assert (counts.sum(1) == 2048 * TOP_K).all()
    assert (counts.max(1) > 2 * counts.min(1)).all()
    assert len({int(hot) for hot in counts.argmax(1)}) > 1, "the popularity order is drawn per layer"


IDENTITY = MODEL.model_copy(
    update={
        "blocks": tuple(
            b.model_copy(update={"moe": b.moe and b.moe.model_copy(update={"zero_experts": 8})}) for b in MODEL.blocks
        )
    }
)


@pytest.mark.parametrize("counts", [None, np.ones((LAYERS, EXPERTS))], ids=["assumed", "counts"])
def test_identity_experts_get_their_part_of_the_choices(counts: np.ndarray | None) -> None:
    """Without a trace a token has top_k * E / (E + Z) choices of experts with weights, on average."""
    workload = Workload.from_text("prefill:256")
    drawn = [assumed_routing(IDENTITY, workload, seed, counts).expert_ids for seed in range(20)]
    ids = np.concatenate(drawn)
    assert ids.min() == -1
    assert ids.max() < EXPERTS
    assert (ids >= 0).mean() == pytest.approx(EXPERTS / (EXPERTS + 8), abs=0.02)
    real = [[e for e in row if e >= 0] for row in ids.reshape(-1, TOP_K).tolist()]
    assert all(len(set(row)) == len(row) for row in real)
    routing = assumed_routing(IDENTITY, workload, 0, counts)
    assert routing.counts(EXPERTS).sum() == (routing.expert_ids >= 0).sum()


def test_a_trace_has_the_identity_experts_of_the_model() -> None:
    ids = np.tile([3, -1], (4, LAYERS, 1))
    trace = Trace.of(ids, EXPERTS, zero_experts=8)
    check_shape(trace, IDENTITY)
    assert (traced_routing(trace, Workload.from_text("decode:4"), 0).expert_ids == ids).all()
    with pytest.raises(MoeplanError, match=r"has 8 identity experts \(zero_experts\) beside the 16; tiny-moe has 0"):
        check_shape(trace, MODEL)
    with pytest.raises(MoeplanError, match=r"has 0 identity experts .* has 8"):
        check_shape(Trace.of(np.tile([3, 1], (4, LAYERS, 1)), EXPERTS), IDENTITY)


def test_counts_only_traces_steer_the_draw() -> None:
    wanted = np.ones((LAYERS, EXPERTS))
    wanted[:, 3] = 1000
    routing = draw_routing(Trace.of_counts(wanted), MODEL, Workload.from_text("prefill:512"), seed=0)
    assert valid(routing.expert_ids, 512)
    assert (routing.counts(EXPERTS)[:, 3] > 500).all()


def test_experts_without_a_count_are_not_chosen_while_others_suffice() -> None:
    counts = np.zeros((LAYERS, EXPERTS))
    counts[:, :4] = 5
    routing = assumed_routing(MODEL, Workload.from_text("prefill:256"), 0, counts)
    assert routing.expert_ids.max() < 4


# Which copy serves a token


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[tuple[int, ...], ...], list[int], int]:
    """Slots of 1 to 5 devices on 1 to 3 hosts that hold every one of 1 to 6 experts."""
    devices, experts = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    slots: list[set[int]] = [draw(st.sets(st.integers(0, experts - 1))) for _ in range(devices)]
    for expert in range(experts):
        slots[draw(st.integers(0, devices - 1))].add(expert)
    hosts = draw(st.lists(st.integers(0, 2), min_size=devices, max_size=devices))
    return tuple(tuple(sorted(held)) for held in slots), hosts, experts


def test_every_phase_comes_up_equally_often() -> None:
    assert sorted((t * COPY_STEP) % COPY_PHASES for t in range(COPY_PHASES)) == list(range(COPY_PHASES))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_without_shares_the_nearest_copies_serve_evenly(layout: tuple) -> None:
    slots, hosts, experts = layout
    table = copy_table(slots, None, hosts, experts)
    assert table.shape == (len(slots), experts, COPY_PHASES)
    assert table.dtype == np.int32
    for source in range(len(slots)):
        for expert in range(experts):
            holders = [device for device, held in enumerate(slots) if expert in held]
            near = [device for device in holders if hosts[device] == hosts[source]] or holders
            near = [source] if source in holders else near
            served = np.bincount(table[source, expert], minlength=len(slots))
            assert set(np.flatnonzero(served)) == set(near)
            assert served[near].max() - served[near].min() <= 1


@settings(max_examples=60, deadline=None)
@given(layouts(), st.randoms(use_true_random=False))
def test_shares_are_honoured_to_one_phase(layout: tuple, random: object) -> None:
    slots, hosts, experts = layout
    raw = [[random.uniform(0.1, 1) for _ in held] for held in slots]  # type: ignore[attr-defined]
    total = np.zeros(experts)
    for held, values in zip(slots, raw, strict=True):
        for expert, value in zip(held, values, strict=True):
            total[expert] += value
    shares = tuple(
        tuple(v / total[e] for e, v in zip(held, vs, strict=True)) for held, vs in zip(slots, raw, strict=True)
    )
    table = copy_table(slots, shares, hosts, experts)
    for device, held in enumerate(slots):
        for expert, share in zip(held, shares[device], strict=True):
            served = (table[:, expert] == device).mean(1)
            assert np.abs(served - share).max() <= 1 / COPY_PHASES + 1e-9
    assert (table == table[:1]).all(), "shares hold from every source"


def test_a_copy_with_no_share_serves_nothing() -> None:
    table = copy_table(((0,), (0,), (0,)), ((0.0,), (1.0,), (0.0,)), [0, 0, 0], 1)
    assert (table == 1).all()


def test_an_expert_that_no_device_serves_is_an_error() -> None:
    with pytest.raises(ValueError, match="no device serves expert 1"):
        copy_table(((0,), (2,)), None, [0, 0], 3)


def test_draws_in_pieces_are_those_of_the_whole(monkeypatch):
    model, workload = load_model("mixtral"), Workload.from_text("prefill:40@8")
    whole = assumed_routing(model, workload, 3)
    monkeypatch.setattr("moeplan.spec.routing._DRAWS", 56)
    assert np.array_equal(assumed_routing(model, workload, 3).expert_ids, whole.expert_ids)


def test_a_step_of_too_many_choices_is_refused():
    with pytest.raises(MoeplanError, match=r"9,999,999 tokens x 32 layers x top-2 are 639,999,936 choices"):
        assumed_routing(load_model("mixtral"), Workload.from_text("decode:9999999"), 0)


def test_draws_are_those_of_the_gumbel_trick():
    model, workload = load_model("tiny-moe"), Workload.from_text("prefill:64@16")
    moe = model.moe_block().moe
    rng, drawn = np.random.default_rng(3), assumed_routing(model, workload, 3)
    for j in range(len(model.moe_layers)):
        popularity = (1.0 + rng.permutation(moe.num_experts)) ** -0.5
        scores = np.log(popularity) + rng.gumbel(size=(workload.tokens, moe.num_experts))
        assert (drawn.expert_ids[:, j] == np.argsort(-scores, axis=1)[:, : moe.top_k]).all()

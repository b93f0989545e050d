"""Statistics of traces against textbook values, invariances and small traces made by hand."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from moeplan.profiler.traces import domain_shift, trace_stats
from moeplan.profiler.traces.stats import divergence, linear_placement, mutual_information
from moeplan.service.pages.trace import draw_stats, stats_table
from moeplan.spec import MoeplanError, Trace


def random_trace(tokens: int = 600, layers: int = 4, experts: int = 8, top_k: int = 2, seed: int = 0) -> Trace:
    """Independent layers: no affinity."""
    scores = np.random.default_rng(seed).random((tokens, layers, experts))
    ids = scores.argsort(axis=2)[:, :, :top_k]
    return Trace.of(ids, experts, seq_len=np.full(6, tokens // 6), model="random")


def chained_trace(tokens: int = 600) -> Trace:
    """Every layer's choice is a permutation of the layer's before: full affinity."""
    ids = [random_trace(tokens, 1).expert_ids[:, 0]]
    for seed in (1, 2, 3):
        ids.append(np.random.default_rng(seed).permutation(8)[ids[-1]])
    return Trace.of(np.stack(ids, 1), 8, seq_len=np.full(6, tokens // 6))


def test_balance_by_hand() -> None:
    ids = np.array([[[0, 1]], [[0, 2]], [[0, 1]], [[3, 0]]])
    stats = trace_stats(Trace.of(ids, 6), devices=3, hosts=1)
    assert stats.expert_imbalance == pytest.approx([4 / (8 / 6)])
    assert stats.device_imbalance == pytest.approx([6 / (8 / 3)])  # experts 0 and 1: 4 + 2
    assert stats.idle_experts.tolist() == [2]
    assert stats.affinity is None  # one layer has no neighbour
    assert stats.fan_out is not None
    np.testing.assert_allclose(stats.fan_out.devices, [[0, 0.5, 0.5]])
    np.testing.assert_allclose(stats.fan_out.hosts, [[0, 1]])
    assert stats.fan_out.mean_devices == pytest.approx([1.5])


@given(st.integers(1, 60), st.integers(1, 60))
def test_linear_placement_is_even_and_consecutive(experts: int, devices: int) -> None:
    placement = linear_placement(experts, devices)
    assert (np.diff(placement) >= 0).all()
    assert placement.max() < devices
    if devices <= experts:
        assert np.ptp(np.bincount(placement, minlength=devices)) <= 1


def test_information_of_known_joint_distributions() -> None:
    x = np.repeat(np.arange(4), 100)
    assert mutual_information(x, x, 4)[0] == pytest.approx(2.0)
    assert mutual_information(x, 3 - x, 4)[0] == pytest.approx(2.0)
    assert mutual_information(x, x // 2, 4)[0] == pytest.approx(1.0)
    assert mutual_information(x, np.tile(np.arange(4), 100), 4)[0] == pytest.approx(0.0, abs=1e-12)
    # Miller-Madow adds (3 + 3 - 3) / (2 * 400 ln 2) when the joint has 4 cells.
    assert mutual_information(x, x, 4)[1] - 2.0 == pytest.approx(3 / (800 * np.log(2)))


@settings(max_examples=50)
@given(st.integers(2, 12), st.integers(1, 300), st.integers(0, 10**6))
def test_information_is_symmetric_and_bounded_by_entropy(experts: int, tokens: int, seed: int) -> None:
    a, b = np.random.default_rng(seed).integers(0, experts, (2, tokens))
    forward, backward = mutual_information(a, b, experts)[0], mutual_information(b, a, experts)[0]
    assert forward == pytest.approx(backward, abs=1e-9)
    assert -1e-9 <= forward <= min(mutual_information(x, x, experts)[0] for x in (a, b)) + 1e-9


def test_correction_removes_the_bias_of_independent_draws() -> None:
    draws = np.random.default_rng(0).integers(0, 8, (40, 2, 600))
    estimates = np.array([mutual_information(a, b, 8) for a, b in draws]).mean(0)
    assert estimates[0] > 0.045  # 49 / (2 * 600 ln 2) = 0.059 bits of nothing
    assert abs(estimates[1]) < 0.01


def test_affinity_against_the_shuffled_control() -> None:
    chained, independent = trace_stats(chained_trace()).affinity, trace_stats(random_trace()).affinity
    assert chained is not None
    assert independent is not None
    np.testing.assert_allclose(chained.information, chained.entropy[:-1])
    assert chained.ratio > 20
    assert independent.ratio == pytest.approx(1, abs=0.25)
    assert chained.control.shape == (5, 3)
    again = trace_stats(chained_trace()).affinity
    np.testing.assert_array_equal(again.control, chained.control)  # type: ignore[union-attr]


def test_fan_out_of_uniform_routing() -> None:
    stats = trace_stats(random_trace(6000, 2), devices=4, hosts=2)
    assert stats.fan_out is not None
    # Two distinct experts of eight share a device of two with chance 1/7, a host of four with chance 3/7.
    np.testing.assert_allclose(stats.fan_out.devices[:, 1], 1 / 7, atol=0.02)
    np.testing.assert_allclose(stats.fan_out.hosts[:, 1], 3 / 7, atol=0.02)
    np.testing.assert_allclose(stats.fan_out.devices.sum(1), 1)


def test_divergence_and_domain_shift() -> None:
    p, q = np.array([[3.0, 1.0, 0.0]]), np.array([[0.0, 0.0, 9.0]])
    assert divergence(p, q) == pytest.approx([1.0])
    assert divergence(p, 5 * p) == pytest.approx([0.0], abs=1e-12)
    assert divergence(p, np.ones((1, 3))) == pytest.approx(divergence(np.ones((1, 3)), p))
    trace = random_trace()
    skewed = Trace.of(trace.expert_ids // 2 + np.array([0, 4]), 8, seq_len=trace.seq_len)
    same, other = domain_shift(trace, random_trace(seed=9)), domain_shift(trace, skewed)
    assert same.own is not None
    assert same.divergence.max() < 0.02
    assert same.own.max() < 0.02
    assert other.divergence.shape == (4,)
    assert domain_shift(trace, Trace.of(np.zeros((9, 4, 1), int), 8)).others is None
    with pytest.raises(MoeplanError, match="4 layers x 8 experts against 3 x 8"):
        domain_shift(trace, random_trace(layers=3))


def test_halves_see_a_drift_within_a_trace() -> None:
    ids = np.repeat(np.arange(2), 300)[:, None, None]
    drifting = Trace.of(ids, 2, seq_len=np.full(6, 100))
    assert trace_stats(drifting, devices=2, hosts=1).halves == pytest.approx([1.0])


def test_counts_only_trace_has_balance_alone(tmp_path: Path) -> None:
    stats = trace_stats(Trace.of_counts(np.array([[1.0, 2.0, 3.0, 2.0]])), devices=2, hosts=1)
    assert stats.expert_imbalance == pytest.approx([1.5])
    assert (stats.affinity, stats.fan_out, stats.halves) == (None, None, None)
    assert "counts only" in rendered(stats_table(stats))
    assert draw_stats(trace_stats(Trace.of_counts(np.ones((3, 8)))), tmp_path / "a.png").stat().st_size > 5000


def test_bad_devices() -> None:
    for devices, hosts, message in ((4, 3, "do not divide"), (2, 4, "do not divide"), (16, 2, "at most one device")):
        with pytest.raises(MoeplanError, match=message):
            trace_stats(random_trace(), devices=devices, hosts=hosts)


def rendered(table: object) -> str:
    console = Console(width=110, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_table_fits_a_terminal_and_holds_the_numbers() -> None:
    stats = trace_stats(chained_trace(), other=random_trace())
    text = rendered(stats_table(stats))
    assert "4 layers x 8 experts, top-2, 600 tokens in 6 sequences" in text
    assert f"{stats.affinity.information.mean():.3f}" in text  # type: ignore[union-attr]
    assert f"{stats.affinity.ratio:.1f} x" in text  # type: ignore[union-attr]
    assert "shift" in text
    assert "…" not in text


def test_json_holds_the_same(tmp_path: Path) -> None:
    stats = trace_stats(chained_trace(), other=random_trace())
    values = json.loads(json.dumps(stats.to_dict(), allow_nan=False))
    assert values["affinity"]["information"] == stats.affinity.information.tolist()  # type: ignore[union-attr]
    assert values["affinity"]["ratio"] > 20
    assert len(values["shift"]["divergence"]) == len(values["halves"]) == 4
    bare = trace_stats(Trace.of_counts(np.ones((3, 8)))).to_dict()
    assert json.loads(json.dumps(bare))["affinity"] is bare["shift"] is None


def test_picture_is_a_png_of_readable_size(tmp_path: Path) -> None:
    from matplotlib.image import imread

    stats = trace_stats(chained_trace(), devices=8, hosts=4)
    path = draw_stats(stats, tmp_path / "stats.png")
    height, width, _ = imread(path).shape
    assert width >= 1000
    assert height >= 700
    assert draw_stats(stats, tmp_path / "again.png").read_bytes() == path.read_bytes()


def test_traces_of_others_are_read(tmp_path: Path) -> None:
    """The form of published traces: uint8 ids, float16 weights, no name; and without the optional fields."""
    trace = random_trace()
    full, bare, foreign = tmp_path / "full.npz", tmp_path / "bare.npz", tmp_path / "foreign.npz"
    arrays = {"expert_ids": trace.expert_ids.astype(np.uint8)}
    np.savez(bare, **arrays)
    np.savez(
        full,
        **arrays,
        expert_weights=trace.expert_weights.astype(np.float16),
        seq_len=trace.seq_len.astype(np.int32),
        num_experts=np.int64(8),
    )
    assert Trace.read(full).digest() == trace.digest()
    assert Trace.read(bare).seq_len.tolist() == [600]
    np.testing.assert_array_equal(trace_stats(Trace.read(full)).expert_counts, trace.expert_counts)
    np.savez(foreign, expert_ids=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(MoeplanError, match="not a readable npz"):
        Trace.read(foreign)
    foreign.write_bytes(full.read_bytes()[:500])
    with pytest.raises(MoeplanError, match="not a readable npz"):
        Trace.read(foreign)
    np.savez(foreign, expert_ids=trace.expert_ids, num_experts=7)
    with pytest.raises(MoeplanError, match=r"must lie in 0\.\.6, found 0\.\.7"):
        Trace.read(foreign)

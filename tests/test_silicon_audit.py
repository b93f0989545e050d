"""The auditor finds planted faults of any size, leaves sound tables alone, and finds the known ones in real tables."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeplan.profiler.silicon.audit import Judge, Judged
from moeplan.profiler.silicon.audited import AuditedTables, open_tables
from moeplan.profiler.silicon.roofline import COUNTED, count_work, least_seconds
from moeplan.profiler.silicon.scale import nearest_systems, scale_table
from moeplan.profiler.silicon.tables import MeasuredTables
from moeplan.spec.errors import MoeplanError
from moeplan.spec.tabled import Origin, System, Table
from moeplan.tests.silicon_cases import BANDWIDTH, FLOPS, START, M, gemm_columns, write_example, write_gemm, write_sheet

SYSTEM = System("gpu_a", "Hopper", 8e10, BANDWIDTH, {"bfloat16": FLOPS, "fp8": 2 * FLOPS}, 3e11, 5e10, 6.4e10, 8)
FEW = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def gemm(**options: object) -> pd.DataFrame:
    raw = pd.DataFrame(gemm_columns("fp8", **options)).drop(columns="framework")  # type: ignore[arg-type]
    frame = raw.rename(columns={"kernel_source": "kernel", "gemm_dtype": "dtype"})
    return frame.assign(seconds=frame.pop("latency") * 1e-3, source="x 1", origin="measured")


def judge(frame: pd.DataFrame, *others: pd.DataFrame) -> Judged:
    return Judge("gemm", SYSTEM).judge(frame, "vllm", "0.24.0", others)


def checks(judged: Judged) -> set[str]:
    return {fault.check for fault in judged.faults}


@FEW
@given(st.integers(0, 2**31), st.floats(0.1, 0.95), st.floats(1e-6, 3e-5), st.floats(1e-6, 3e-5))
def test_sound_tables_stand(seed: int, share: float, start: float, theirs: float) -> None:
    """Any efficiency, and starts that differ by less than the fourfold: nothing is found."""
    theirs = float(np.clip(theirs, start / 3, start * 3))
    judged = judge(gemm(seed=seed, share=share, start=start), gemm(seed=seed + 1, start=theirs))
    assert judged.faults == ()
    assert len(judged.good) == len(gemm())
    assert judged.condemned.empty


@FEW
@given(st.integers(0, 2**31), st.floats(50e-6, 1e-3))
def test_a_slow_start_is_found_by_other_engines(seed: int, start: float) -> None:
    judged = judge(gemm(seed=seed, start=start), gemm(seed=1), gemm(seed=2, start=2 * START))
    assert "slow start" in checks(judged)
    assert judged.good.empty
    others = judge(gemm(seed=1), gemm(seed=seed, start=start), gemm(seed=2, start=2 * START))
    assert others.faults == ()  # those that are right are not condemned for it


@FEW
@given(st.integers(0, 2**31), st.floats(2.5, 1000))
def test_times_in_a_wrong_unit_are_impossible(seed: int, factor: float) -> None:
    frame = gemm(seed=seed)
    judged = judge(frame.assign(seconds=frame["seconds"] / factor))
    assert "faster than possible" in checks(judged)
    assert judged.good.empty


@FEW
@given(st.integers(0, 2**31), st.floats(500, 1e6))
def test_times_a_thousand_times_too_long_are_found_without_others(seed: int, factor: float) -> None:
    frame = gemm(seed=seed)
    assert "slow" in checks(judge(frame.assign(seconds=frame["seconds"] * factor)))


@FEW
@given(st.integers(0, 2**31), st.floats(3e-2, 1.0))
def test_times_that_do_not_grow_are_flat(seed: int, time: float) -> None:
    noise = np.random.default_rng(seed).normal(1, 0.05, len(gemm())).clip(0.8, 1.2)
    assert "flat" in checks(judge(gemm().assign(seconds=time * noise)))


@FEW
@given(st.integers(0, 2**31), st.floats(0.5, 0.8))
def test_times_that_fall_as_work_grows_are_found(seed: int, share: float) -> None:
    """A share of the points, drawn anywhere, takes as long as the largest shape."""
    frame = gemm(seed=seed)
    hit = np.random.default_rng(seed).random(len(frame)) < share
    raised = frame["seconds"].where(~hit, frame["seconds"].max() * 2)
    # The last point of a curve has none after it.
    assert "falling" in checks(judge(frame.assign(seconds=raised)))


def test_few_impossible_rows_are_left_out_and_the_part_stands() -> None:
    frame = gemm()
    slot = frame.index[frame["m"] == M[-1]][:1]
    frame.loc[slot, "seconds"] /= 10
    judged = judge(frame)
    (fault,) = judged.faults
    assert not fault.condemned
    assert "1 of" in fault.text
    assert len(judged.good) == len(frame) - 1


def test_the_roofline_is_what_one_counts_by_hand() -> None:
    one = pd.DataFrame({"dtype": ["fp8"], "m": [100], "n": [200], "k": [300]})
    work = count_work(one, "gemm")
    assert work.flops[0] == sum(2 for _ in range(100) for _ in range(200) for _ in range(300 // 300)) * 300
    assert work.memory[0] == 200 * 300 + 100 * 300 + 2 * 100 * 200
    # Causal attention: query i of 5, after 3 cached, sees 3 + i + 1 keys.
    shape = {"dtype": ["bfloat16"], "kv_dtype": ["fp8"], "heads": [4], "kv_heads": [2], "head_dim": [16]}
    sequences = {"batch": [2], "new_tokens": [5], "past_tokens": [3], "window": [0]}
    work = count_work(pd.DataFrame(shape | sequences), "context_attention")
    pairs = 2 * sum(3 + i + 1 for i in range(5))
    assert work.flops[0] == 2 * 2 * 4 * 16 * pairs
    assert work.memory[0] == 2 * (3 + 5) * 2 * 16 * 2 * 1 + 2 * 5 * 4 * 16 * 2 * 2
    # 8 GPUs: everyone sends at least what the other seven hold of an eighth each.
    ring = pd.DataFrame({"dtype": ["half"], "gpus": [8], "bytes": [8000]})
    assert count_work(ring, "nccl").sent[0] == 7000
    assert least_seconds(ring, "nccl", SYSTEM)[0] == pytest.approx(7000 / 3e11)
    across = ring.assign(gpus=16)
    assert least_seconds(across, "nccl", SYSTEM)[0] == pytest.approx(7500 / 5e10)


def test_experts_that_even_routing_uses_are_counted_one_by_one() -> None:
    columns = {"dtype": ["bfloat16"], "hidden": [8], "ffn": [4], "top_k": [2], "experts": [16], "tp": [1]}
    for tokens, ep in ((1, 1), (4, 1), (64, 1), (64, 4), (8, 4)):
        frame = pd.DataFrame(columns | {"tokens": [tokens], "ep": [ep], "routing": ["balanced"]})
        rows = [(token * 2 + slot) % 16 for token in range(tokens) for slot in range(2)]
        mine = [expert for expert in rows if expert % ep == 0]
        work = count_work(frame, "moe")
        assert work.flops[0] == len(mine) * 2 * 2 * 8 * 4
        assert work.memory[0] == len(set(mine)) * 2 * 8 * 4 * 2


def slower(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(latency=frame["latency"] + 0.3)


def test_what_is_condemned_is_replaced_visibly(tmp_path: Path) -> None:
    known = AuditedTables(MeasuredTables(write_example(tmp_path, slower)))
    table = known.table("gemm", "gpu_a", "vllm")
    assert table.origin.kind == "replaced"
    assert "slow start" in table.origin.text
    by_type = dict(iter(table.frame.groupby("dtype")))
    assert set(by_type["bfloat16"]["origin"]) == {"measured"}
    assert set(by_type["fp8"]["origin"]) == {"replaced"}
    assert set(by_type["fp8"]["source"]) == {"sglang 0.5.14"}
    theirs = known.table("gemm", "gpu_a", "sglang")
    assert theirs.origin == Origin("measured", "measured on gpu_a under sglang 0.5.14")
    expected = theirs.frame[theirs.frame["dtype"] == "fp8"]["seconds"].tolist()
    assert sorted(by_type["fp8"]["seconds"]) == sorted(expected)


def test_another_version_of_the_engine_comes_before_another_engine(tmp_path: Path) -> None:
    write_example(tmp_path, slower)
    write_gemm(tmp_path, "vllm", "0.19.0", seed=7)
    frame = AuditedTables(MeasuredTables(tmp_path)).table("gemm", "gpu_a", "vllm").frame
    rows = frame[frame["dtype"] == "fp8"]
    assert set(rows["source"]) == {"vllm 0.19.0"}
    assert set(rows["origin"]) == {"replaced"}
    asked = AuditedTables(MeasuredTables(tmp_path)).table("gemm", "gpu_a", "vllm", "0.24.0").frame
    assert set(asked[asked["dtype"] == "fp8"]["source"]) == {"vllm 0.19.0"}


def test_what_nothing_can_replace_is_kept_told_and_refused_if_strict(tmp_path: Path) -> None:
    write_sheet(tmp_path, "gpu_a")
    write_gemm(tmp_path, "vllm", "0.24.0", lambda frame: frame.assign(latency=100.0))
    table = AuditedTables(MeasuredTables(tmp_path)).table("gemm", "gpu_a", "vllm")
    assert "nothing: there is no other table" in table.origin.text
    assert (table.frame["dtype"] == "fp8").any()
    with pytest.raises(MoeplanError, match="nothing: there is no other table"):
        AuditedTables(MeasuredTables(tmp_path), strict=True).table("gemm", "gpu_a", "vllm")


def test_what_was_not_measured_is_scaled_or_refused(tmp_path: Path) -> None:
    known = AuditedTables(MeasuredTables(write_example(tmp_path)))
    table = known.table("gemm", "gpu_b", "vllm")
    assert table.origin.kind == "scaled"
    assert set(table.frame["origin"]) == {"scaled"}
    assert set(table.frame["source"]) == {"vllm 0.24.0 on gpu_a"}
    with pytest.raises(MoeplanError, match="no engine has a table; there is one of gpu_a"):
        AuditedTables(known.measured, strict=True).table("gemm", "gpu_b", "vllm")
    with pytest.raises(MoeplanError, match="no engine has a table"):
        known.table("moe", "gpu_b", "vllm")


@FEW
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.3, 1.0), st.integers(0, 2**31))
def test_scaling_finds_the_times_of_a_gpu_that_runs_at_the_same_share(
    memory: float, compute: float, share: float, seed: int
) -> None:
    """start + roofline / share is scaled to start + the other roofline / share, whichever bound holds on either."""
    other = System("gpu_b", "Hopper", 8e10, BANDWIDTH * memory, {"fp8": 2 * FLOPS * compute}, 3e11, 5e10, 6.4e10, 8)
    frame = gemm(seed=seed)
    exact = frame.assign(seconds=START + least_seconds(frame, "gemm", SYSTEM) / share)
    table = Table("gemm", "gpu_a", "vllm", "1", exact, Origin("measured", ""))
    scaled = scale_table(table, SYSTEM, other)
    expected = START + least_seconds(frame, "gemm", other) / share
    # The shortest time, which counts as the start, holds a little work.
    slack = (exact["seconds"].min() - START) * max(1, 1 / memory, 1 / compute)
    assert np.allclose(scaled.frame["seconds"], expected, rtol=1e-9, atol=slack)


def test_types_without_hardware_are_left_out(tmp_path: Path) -> None:
    old = System("old", "Ampere", 8e10, BANDWIDTH, {"bfloat16": FLOPS}, 3e11, 5e10, 6.4e10, 8)
    table = Table("gemm", "gpu_a", "vllm", "1", gemm(), Origin("measured", ""))
    with pytest.raises(MoeplanError, match="gemm on old: it has no hardware for fp8"):
        scale_table(table, SYSTEM, old)


@pytest.fixture(scope="module")
def known() -> AuditedTables:
    return open_tables()


class TestInstalled:
    """The tables of the extra."""

    @pytest.mark.parametrize("system", ["h200_sxm", "b200_sxm", "gb200", "l40s"])
    def test_the_known_corrupt_part_is_found_and_replaced(self, known: AuditedTables, system: str) -> None:
        table = known.table("gemm", system, "vllm")
        condemned = [fault for fault in known.judged("gemm", system, "vllm", "0.24.0").faults if fault.condemned]
        assert {fault.dtype for fault in condemned} == {"fp8_block"}
        rows = table.frame[table.frame["dtype"] == "fp8_block"]
        assert set(rows["origin"]) == {"replaced"}
        small = rows[(rows["m"] * rows["n"] * rows["k"]) < 2**24]
        assert small["seconds"].median() < 16e-6
        assert set(table.frame[table.frame["dtype"] == "fp8"]["origin"]) == {"measured"}
        known.forget()

    def test_faster_under_skew_is_told_and_condemns_nothing(self, known: AuditedTables) -> None:
        (fault,) = (
            fault
            for fault in known.judged("moe", "h200_sxm", "sglang", "0.5.14").faults
            if fault.check == "faster under skew"
        )
        assert not fault.condemned
        assert "7168x2048, 8 of 256" in fault.text
        known.forget()

    @pytest.mark.parametrize(
        ("target", "operator", "expected"),
        [
            ("l4", "gemm", "l40s"),
            ("a30", "gemm", "a100_sxm"),
            ("h100_pcie", "gemm", "h100_sxm"),
            ("a100_pcie", "gemm", "a100_sxm"),
            ("h100_pcie", "all_reduce", "rtx_pro_6000_server"),
            ("l4", "all_reduce", "l40s"),
        ],
    )
    def test_the_nearest_gpu(self, known: AuditedTables, target: str, operator: str, expected: str) -> None:
        sources = [known.system(name) for name in known.systems() if known.engines(name)]
        assert nearest_systems(known.system(target), sources, operator)[0].name == expected

    def test_every_counted_operator_has_a_table(self, known: AuditedTables) -> None:
        held = {one for name in ("h200_sxm", "b60") for e in known.engines(name) for one in known.operators(name, e)}
        assert COUNTED.keys() <= held

"""Experts computed in a host's memory, where they rest: the call that is timed, and what the planner makes of it.

Ranks run such plans on processors whose host is themselves, here, in test_strategies and test_executor (against the
reference): no GPU is needed.
"""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.planner.strategies.reading import Needed, Reading
from moeplan.runtime.calls import operator_call
from moeplan.runtime.kernels import expert_ffn
from moeplan.runtime.launch import LocalLauncher
from moeplan.runtime.strategies import offload
from moeplan.runtime.tiers import HOST, ExpertFile, HostMemory
from moeplan.spec import Cluster, Plan, Trace, Workload
from moeplan.spec.errors import MoeplanError
from moeplan.spec.operators import expert_shape
from moeplan.tests.synthetic import cluster, tiny_model

MODEL = tiny_model(layers=4, hidden=64, ffn=128, experts=8)
DECODE, PREFILL = Workload.from_text("decode:4@64"), Workload.from_text("prefill:256@32")


def test_the_host_computes_one_expert_from_where_it_rests(monkeypatch):
    log = []
    on_host = offload.on_host

    def recorded(mine, gate_up, down, activation):
        log.append((mine, gate_up, down, on_host(mine, gate_up, down, activation)))
        return log[-1][-1]

    monkeypatch.setattr(offload, "on_host", recorded)
    block = MODEL.moe_block()
    run = operator_call("offload_host", MODEL, block, torch.float32, HOST, devices=2, tensor=1, tokens=5)
    run()
    run()
    (mine, gate_up, down, y), (_, other, _, _) = log
    assert (mine.x.shape, gate_up.shape, down.shape) == ((5, 64), (1, 2, 128, 64), (1, 64, 128))
    assert gate_up.data_ptr() != other.data_ptr()  # no expert is in a cache from the call before
    ids = torch.zeros((5, 1), dtype=torch.int32)
    wanted = expert_ffn(mine.x, gate_up, down, ids, torch.ones(5, 1), activation="silu", implementation="reference")
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


def test_only_what_rests_in_memory_is_computed_there(tmp_path):
    memory = HostMemory(2, 4096, HOST)
    memory.write(1, torch.full((4096,), 7, dtype=torch.uint8))
    assert memory.rests(1).tolist() == [7] * 4096
    file = ExpertFile(tmp_path, 1, 4096)
    with pytest.raises(MoeplanError, match="experts on a disk cannot be computed there"):
        file.rests(0)
    file.close()


@st.composite
def needed(draw) -> Needed:
    late = sorted(draw(st.lists(st.integers(1, 9), max_size=6)), reverse=True)
    early = draw(st.integers(0, 3))
    rows = np.array([*draw(st.lists(st.integers(1, 9), min_size=early, max_size=early)), *late], int)
    seconds = st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)).map(lambda s: np.array(s, float))
    ahead = draw(st.permutations([True] * early + [False] * draw(st.integers(0, 2))))
    hosted = draw(seconds) if draw(st.booleans()) else np.full(len(rows), np.inf)
    return Needed(float(draw(st.integers(0, 5))), rows, draw(seconds), hosted, early, list(ahead))


@given(needed(), st.integers(1, 3), st.integers(1, 7), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=300, deadline=None)
def test_no_other_number_of_rows_is_done_sooner(own, places, read, gap, turn):
    """Tried one by one, each in a reader of its own; the choice leaves the reader as it was."""
    reading = Reading(float(read), [0.0] * places)
    before = replace(reading, places=list(reading.places))
    chosen = own.best(reading, float(gap), float(gap + turn))
    assert reading == before

    def done(host_rows: int) -> float:
        copy = replace(before, places=list(before.places))
        return sum(copy.layer(float(gap), float(gap + turn), own.cold(host_rows)))

    assert done(chosen) == min(done(rows) for rows in range(11))
    cold = own.cold(chosen)
    assert cold.hosted + len(cold.seconds) == len(own.rows)
    assert np.isfinite(cold.host)


# the search ----------------------------------------------------------------------------------------------------------


@functools.cache
def machines(copied: float = 1e9) -> Cluster:
    return cluster(MODEL, ((1.0, 1.0),), copied=copied)


def short(machine: Cluster, workload: Workload, trace: Trace | None = None, share: float = 0.5) -> int:
    """Bytes in which this share of a device's experts fits, beside everything else."""
    plan = solve(MODEL, machine, workload, trace=trace, strategy="ep")
    return max(m.total - int((1 - share) * m.weights) for m in plan.predicted.memory)


def without(machine: Cluster, operator: str) -> Cluster:
    kinds = [
        kind.model_copy(update={"operators": tuple(o for o in kind.operators if o.operator != operator)})
        for kind in machine.kinds
    ]
    return machine.model_copy(update={"kinds": tuple(kinds)})


@pytest.mark.parametrize("workload", [DECODE, PREFILL], ids=str)
def test_slow_copies_leave_experts_to_the_host(workload):
    machine = machines(5e7)
    limit = short(machine, workload)
    plan = solve(MODEL, machine, workload, memory_bytes=limit)
    copying = solve(MODEL, without(machine, "offload_host"), workload, memory_bytes=limit)
    assert any(layer.host_rows for layer in plan.layers)
    assert plan.predicted.step_seconds < copying.predicted.step_seconds
    assert not any(layer.host_rows for layer in copying.layers)
    assert any("for want of curves: experts computed by the GPUs' hosts" in known for known in copying.notes)
    assert not any("for want of curves" in known for known in plan.notes)
    assert plan.solver.bound <= plan.solver.objective
    reads = plan.predicted.reads
    assert reads is not None
    assert reads.host > 0
    assert any(f"{reads.host:g} more are computed by the hosts' processors" in known for known in plan.notes)
    assert Plan.parse(plan.to_json(), "plan") == plan
    step = Step.of(plan, machine)
    assert step.seconds(list(plan.layers)) == pytest.approx(plan.solver.objective)


def test_fast_copies_leave_nothing_to_the_host():
    machine = machines(1e12)
    plan = solve(MODEL, machine, PREFILL, memory_bytes=short(machine, PREFILL))
    assert plan.offload is not None
    assert not any(layer.host_rows for layer in plan.layers)


def test_the_bound_holds_whatever_hosts_compute():
    machine = machines(2e8)
    plan = solve(MODEL, machine, DECODE, memory_bytes=short(machine, DECODE))
    step, rng = Step.of(plan, machine), np.random.default_rng(0)
    for rows in itertools.product((0, 1, 2, 99), repeat=2):
        layers = []
        for layer in plan.layers:
            stays = [
                rng.permutation(held)[: len(kept)].tolist()
                for held, kept in zip(layer.slots, layer.resident, strict=True)
            ]
            resident = tuple(tuple(sorted(one)) for one in stays)
            changes = {"resident": resident, "ahead": ((), ()), "host_rows": rows}
            layers.append(layer.model_copy(update=changes))
        assert step.seconds(layers) >= plan.solver.bound


def test_a_disk_s_experts_are_never_left_to_a_host():
    machine = cluster(MODEL, ((1.0, 1.0),), disk=5e7)
    plan = solve(MODEL, machine, DECODE, memory_bytes=short(machine, DECODE))
    assert plan.offload is not None
    assert plan.offload.folder == "/disk"
    assert not any(layer.host_rows for layer in plan.layers)


@pytest.mark.parametrize(("workload", "share"), [(DECODE, 0.2), (PREFILL, 0.4)], ids=str)
def test_ranks_leave_to_their_hosts_what_is_expected(tmp_path, workload, share):
    """A plan for GPUs, by the trace that the ranks follow."""
    rng = np.random.default_rng(1)
    popular = rng.random((4, 8)) ** 4
    ids = (rng.random((workload.tokens * 8, 4, 8)) * popular).argsort(2)[:, :, -2:]
    trace, machine = Trace.of(ids.astype(np.int16), 8), machines(5e7)
    plan = solve(MODEL, machine, workload, trace=trace, memory_bytes=short(machine, workload, trace, share))
    job = {"plan": plan.to_json(), "trace": str(trace.write(tmp_path / "trace.npz"))}
    ranks = LocalLauncher(2).run("moeplan.tests.test_foresight:on_rank", job, timeout=60)
    needed, listed, ahead, _, hosted = np.sum(ranks, axis=0)
    reads = plan.predicted.reads
    assert reads is not None
    assert reads.host > 0
    assert (needed, listed, ahead, hosted) == (reads.needed, reads.listed, reads.ahead, reads.host)


def test_the_shape_of_its_curve_is_the_expert_s():
    curve = machines().operator(0, "offload_host", expert_shape(MODEL.moe_block()), "f32", "tiny")
    assert curve.at(tokens=64).seconds > curve.at(tokens=1).seconds

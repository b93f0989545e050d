"""Collectives over unequal and empty row counts, on four ranks, against what one process computes."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moeplan.runtime.collectives import (
    all_gather,
    all_gather_start,
    all_reduce,
    all_to_all,
    exchange_counts,
    reduce_scatter,
)
from moeplan.runtime.groups import consecutive_group, giving_way
from moeplan.runtime.launch import LocalLauncher

WORLD = 4
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "bytes": torch.uint8}
# rows from each rank (line) to each rank (column)
EXCHANGES = {
    "even": [[2, 2, 2, 2]] * 4,
    "uneven": [[1, 5, 0, 2], [7, 0, 2, 0], [3, 1, 4, 1], [0, 0, 6, 0]],
    "one sends": [[0, 0, 0, 0], [4, 4, 4, 4], [0, 0, 0, 0], [0, 0, 0, 0]],
    "one receives": [[0, 0, 3, 0], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 5, 0]],
    "nothing": [[0, 0, 0, 0]] * 4,
    "large": [[4000, 1, 4000, 0], [1, 4000, 0, 9], [0, 4000, 1, 1], [4000, 0, 0, 4000]],
}
COUNTS = {
    "even": [3, 3, 3, 3],
    "uneven": [1, 0, 6, 2],
    "one": [0, 5, 0, 0],
    "nothing": [0, 0, 0, 0],
    "large": [3000, 1, 2000, 4000],
}
COLUMNS = 24


def rows(count: int, dtype: torch.dtype, *seed: int) -> torch.Tensor:
    """[count, COLUMNS] small integers: sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(sum(s * 1000**i for i, s in enumerate(seed)))
    return torch.randint(0, 9, (count, COLUMNS), generator=generator).to(dtype)


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    return (got.double() - wanted.double()).abs().max().item() if got.numel() else 0.0


def on_rank(rank, job) -> dict[str, dict]:
    """Largest difference of each case on this rank."""
    me, members, found = rank.rank, range(WORLD), {}
    for (kind, dtype), (name, matrix) in itertools.product(DTYPES.items(), EXCHANGES.items()):
        sent = [[rows(matrix[i][j], dtype, i, j) for j in members] for i in members]
        counts = exchange_counts(torch.tensor(matrix[me]))
        assert counts.tolist() == [matrix[i][me] for i in members]
        got = all_to_all(torch.cat(sent[me]), matrix[me], counts.tolist())
        found[f"all_to_all {kind} {name}"] = difference(got, torch.cat([sent[i][me] for i in members]))
    for (kind, dtype), (name, counts) in itertools.product(DTYPES.items(), COUNTS.items()):
        own = [rows(n, dtype, i) for i, n in enumerate(counts)]
        found[f"all_gather {kind} {name}"] = difference(all_gather(own[me], counts), torch.cat(own))
        whole = torch.full((sum(counts), COLUMNS), 99, dtype=dtype)
        pending = all_gather_start(own[me], whole.split(counts))
        torch.ones(64, 64) @ torch.ones(64, 64)
        pending.wait()
        found[f"all_gather_start {kind} {name}"] = difference(whole, torch.cat(own))
        if kind == "bytes":
            continue
        partials = [rows(sum(counts), dtype, i) for i in members]
        wanted = sum(p.float() for p in partials).to(dtype).split(counts)[me]
        found[f"reduce_scatter {kind} {name}"] = difference(reduce_scatter(partials[me], counts), wanted)
        total = all_reduce(partials[me].clone())
        found[f"all_reduce {kind} {name}"] = difference(total, sum(p.float() for p in partials).to(dtype))
    # bf16 sums that would lose bits if they were not accumulated in f32
    fine = [torch.full((4, 1), v, dtype=torch.bfloat16) for v in (256.0, 1.0, 1.0, 2.0)]
    found["reduce_scatter accumulates in f32"] = difference(reduce_scatter(fine[me], [1, 1, 1, 1]), fine[0][:1] + 4)
    groups = groups_on_rank(rank)
    return {"cases": found | two_at_once(me), "groups": groups, "policies": policies()}


def two_at_once(me: int) -> dict[str, float]:
    """A large gather under way does not disturb exchanges that begin and end meanwhile."""
    counts, dtype = [2000, 3000, 1000, 2000], torch.float32
    own = [rows(n, dtype, i) for i, n in enumerate(counts)]
    whole = torch.empty(sum(counts), COLUMNS)
    pending = all_gather_start(own[me], whole.split(counts))
    small = all_reduce(torch.ones(5))
    exchanged = all_to_all(own[me][:4], [1, 1, 1, 1], [1, 1, 1, 1])
    pending.wait()
    return {
        "gather beside others": difference(whole, torch.cat(own)),
        "all_reduce beside a gather": difference(small, torch.full((5,), float(WORLD))),
        "all_to_all beside a gather": difference(exchanged, torch.stack([o[me] for o in own])),
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, dict]]:
    return LocalLauncher(WORLD).run("moeplan.tests.test_collectives:on_rank", {}, timeout=60)


@pytest.fixture
def found(results) -> list[dict[str, float]]:
    return [r["cases"] for r in results]


def test_every_case_ran_on_every_rank(found):
    exchanges, gathers = len(DTYPES) * len(EXCHANGES), 2 * len(DTYPES) * len(COUNTS)
    assert [len(f) for f in found] == [exchanges + gathers + 2 * 2 * len(COUNTS) + 1 + 3] * WORLD


@pytest.mark.parametrize("collective", ["all_to_all", "all_gather", "reduce_scatter", "all_reduce", "gather beside"])
def test_collective_equals_single_process(found, collective):
    cases = {name: max(f[name] for f in found) for name in found[0] if name.startswith(collective)}
    assert cases
    assert max(cases.values()) == 0, {name: d for name, d in cases.items() if d}


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_single_rank_keeps_its_rows():
    x = rows(4, torch.float32, 1)
    assert exchange_counts(torch.tensor([4])).tolist() == [4]
    for y in (all_to_all(x, [4], [4]), all_gather(x, [4]), reduce_scatter(x, [4]), all_reduce(x.clone())):
        assert torch.equal(x, y)


def policies() -> list[tuple[str, int]]:
    """Name and scheduling policy of every thread of this process, the computing one first."""
    tasks = sorted(Path("/proc/self/task").iterdir(), key=lambda task: int(task.name))
    return [((task / "comm").read_text().strip(), os.sched_getscheduler(int(task.name))) for task in tasks]


def test_threads_of_groups_go_before_nobody(results):
    for result in results:
        found = result["policies"]
        waiting = [policy for name, policy in found if name == "gloo_tcp_loop"]
        assert len(waiting) >= 2  # of all ranks, and of a group
        assert set(waiting) == {os.SCHED_BATCH}
        assert found[0][1] == os.SCHED_OTHER


def test_giving_way_ends_and_leaves_a_chosen_policy_alone():
    def fail() -> None:
        with giving_way():
            raise ValueError(os.sched_getscheduler(0))

    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    with pytest.raises(ValueError, match=str(os.SCHED_BATCH)):
        fail()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER

    def chosen() -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        with giving_way():
            assert os.sched_getscheduler(0) == os.SCHED_IDLE
        assert os.sched_getscheduler(0) == os.SCHED_IDLE

    with ThreadPoolExecutor(1) as pool:  # a thread of its own: nobody may leave SCHED_IDLE without a privilege
        pool.submit(chosen).result()


def test_a_sandbox_without_policies_is_told(monkeypatch):
    def refuse(*_) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    with pytest.warns(UserWarning, match="SCHED_BATCH is refused"), giving_way():
        pass


def groups_on_rank(rank) -> dict[str, list[float]]:
    """Neighbours exchange only with each other."""
    group = consecutive_group(2)
    own = torch.full((rank.rank + 1, 1), float(rank.rank))
    first = rank.rank // 2 * 2
    counts = [first + 1, first + 2]
    return {
        "gathered": all_gather(own, counts, group).flatten().tolist(),
        "reduced": reduce_scatter(torch.full((sum(counts), 1), float(rank.rank)), counts, group).flatten().tolist(),
        "summed": all_reduce(torch.tensor([float(rank.rank)]), group).tolist(),
    }


def test_consecutive_groups(results):
    for rank, result in enumerate(r["groups"] for r in results):
        a = rank // 2 * 2
        assert result["gathered"] == [a] * (a + 1) + [a + 1] * (a + 2)
        assert result["reduced"] == [2 * a + 1] * (rank + 1)
        assert result["summed"] == [2 * a + 1]

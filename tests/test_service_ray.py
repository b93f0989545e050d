"""Jobs on a Ray cluster on this machine: the same answers, stopped, and lost."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytest.importorskip("fastapi")
from moeplan import Placement, place
from moeplan.service.jobs.pool import Run, Work
from moeplan.service.jobs.ray_pool import RayPool
from moeplan.service.jobs.requests import PlaceRequest
from moeplan.spec.errors import MoeplanError
from moeplan.tests.routings import chained_trace
from moeplan.tests.services import PATIENCE


@pytest.fixture(scope="module")
def pool() -> Iterator[RayPool]:
    found = RayPool("local")
    yield found
    found.close()


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chained_trace(0, 2, 4, 512, 1).write(tmp_path_factory.mktemp("trace") / "trace.npz")


def work(trace: Path, folder: Path, **asked: int) -> Work:
    folder.mkdir()
    request = PlaceRequest(trace="0" * 64, devices=2, **asked)  # type: ignore[arg-type]
    return Work(request.model_dump(mode="json"), {"trace": trace}, folder)


def told_until(run: Run, over: bool) -> list[dict]:
    """What a run tells until it is over, or until it tells something."""
    told: list[dict] = []
    until = time.monotonic() + PATIENCE
    while run.outcome is None and (over or not told):
        assert time.monotonic() < until
        told += run.wait(0.5)
    return told


def test_two_runs_at_once_have_the_librarys_answers(pool: RayPool, trace: Path, tmp_path: Path) -> None:
    runs = [pool.start(work(trace, tmp_path / str(seed), steps=100, seed=seed, time_limit=60)) for seed in (0, 1)]
    for seed, run in enumerate(runs):
        assert told_until(run, over=True)[-1]["bound"] >= 0
        assert run.outcome is not None
        assert run.outcome.result is not None, run.outcome
        found = Placement.parse(run.outcome.result.read_text(), "the answer")
        assert found.layers == place(trace, devices=2, steps=100, seed=seed, time_limit=60).layers


def test_what_is_wrong_is_said(pool: RayPool, trace: Path, tmp_path: Path) -> None:
    run = pool.start(work(trace, tmp_path / "wrong", slots=3))
    told_until(run, over=True)
    assert run.outcome is not None
    assert run.outcome.error == "4 experts need 4 slots, got 3: raise --slots"


def test_a_run_is_stopped_with_the_best_found_and_killed(pool: RayPool, trace: Path, tmp_path: Path) -> None:
    long = {"steps": 2_000_000_000, "time_limit": 600}
    run = pool.start(work(trace, tmp_path / "stopped", **long))
    told_until(run, over=False)
    run.stop()
    told_until(run, over=True)
    assert run.outcome is not None
    assert run.outcome.result is not None
    assert json.loads(run.outcome.result.read_text())["kind"] == "moeplan.placement"
    lost = pool.start(work(trace, tmp_path / "lost", **long))
    told_until(lost, over=False)
    pool.ray.kill(lost._actor)  # type: ignore[attr-defined]
    told_until(lost, over=True)
    assert lost.outcome is not None
    assert "with the Ray node or actor that it ran on" in (lost.outcome.died or "")


def test_without_a_cluster_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MoeplanError, match=r"pip install 'moeplan\[ray\]'"):
        RayPool("auto")

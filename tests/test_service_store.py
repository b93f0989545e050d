"""The store of jobs, on SQLite and on PostgreSQL: every job ends once, whoever is lost on the way."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

pytest.importorskip("sqlalchemy")
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import delete, text

from moeplan.service.jobs import identity
from moeplan.service.jobs import leases as leasing
from moeplan.service.jobs.database import Database
from moeplan.service.jobs.errors import BusyError, ConflictError, UnavailableError, UnknownError
from moeplan.service.jobs.leases import Leases
from moeplan.service.jobs.store import ENDED, MAX_DEATHS, MAX_STARTS, Store
from moeplan.service.jobs.tables import documents, jobs, metadata, services
from moeplan.spec.errors import MoeplanError
from moeplan.tests.postgresql import server


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    with server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        found = Database.sqlite(tmp_path / "jobs.sqlite")
    else:
        found = Database.postgresql(request.getfixturevalue("postgresql"))
    found.migrate()
    emptied(found)
    yield found
    found.close()


def emptied(database: Database) -> None:
    with database.write() as connection:
        for table in (jobs, documents, services):
            connection.execute(delete(table))


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database, max_queued=5)


def registered(store: Store, patience: float = 60.0) -> Leases:
    found = Leases(store, patience)
    found.register()
    return found


def test_migrations_make_the_tables(database: Database) -> None:
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_services_that_start_at_once_migrate_one_after_the_other(database: Database, tmp_path: Path) -> None:
    with database.write() as connection:
        for name in ("jobs", "documents", "services", "alembic_version"):
            connection.execute(text(f"DROP TABLE {name}"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: database.migrate(), range(8)))
    with database.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM alembic_version")).scalar_one() == 1


def test_a_question_is_one_job(store: Store) -> None:
    first, new = store.submit("place", {"a": 1, "b": 2})
    again, other = store.submit("place", {"b": 2, "a": 1})
    assert (new, other) == (True, False)
    assert first.id == again.id
    assert store.submit("solve", {"a": 1, "b": 2})[1]
    assert store.submit("place", {"a": 1, "b": 2}, salt="0.3")[1]


def test_asked_by_many_at_once_it_is_one_job(store: Store) -> None:
    barrier = threading.Barrier(8)

    def ask(_: int) -> str:
        barrier.wait()
        return store.submit("place", {"a": 1})[0].id

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1
    assert store.counts()["queued"] == 1


def test_too_many_that_wait_are_refused(store: Store) -> None:
    for i in range(5):
        store.submit("place", {"i": i})
    with pytest.raises(BusyError, match="5 jobs wait already"):
        store.submit("place", {"i": 5})
    assert not store.submit("place", {"i": 4})[1]


def test_claimed_by_many_at_once_each_job_has_one_worker(store: Store) -> None:
    asked = {store.submit("place", {"i": i})[0].id for i in range(5)}
    services = [registered(store) for _ in range(4)]
    barrier = threading.Barrier(16)

    def claim(i: int) -> str | None:
        barrier.wait()
        found = services[i % 4].claim()
        return found and found[0].id

    with ThreadPoolExecutor(16) as pool:
        claimed = [job for job in pool.map(claim, range(16)) if job]
    while (more := services[0].claim()) is not None:
        claimed.append(more[0].id)
    assert sorted(claimed) == sorted(asked)


def test_a_job_ends_once(store: Store) -> None:
    job, _ = store.submit("place", {})
    service = registered(store)
    claimed = service.claim()
    assert claimed is not None
    assert service.finish(claimed[1], result="f" * 64)
    assert not service.finish(claimed[1], error="twice")
    assert not service.died(claimed[1], "afterwards")
    found = store.job(job.id)
    assert (found.state, found.result, found.error, found.starts) == ("done", "f" * 64, None, 1)
    with pytest.raises(ConflictError, match="done already"):
        store.cancel(job.id)
    assert store.submit("place", {})[0].id == job.id


def test_a_question_that_failed_or_was_cancelled_can_be_asked_again(store: Store) -> None:
    service = registered(store)
    failed, _ = store.submit("place", {})
    claimed = service.claim()
    assert claimed is not None
    service.finish(claimed[1], error="no such slot")
    again, new = store.submit("place", {})
    assert new
    assert store.cancel(again.id).state == "cancelled"
    assert store.cancel(again.id).state == "cancelled"
    assert store.submit("place", {})[1]
    assert store.job(failed.id).error == "no such slot"


def test_a_running_job_that_is_cancelled_keeps_what_was_found(store: Store) -> None:
    job, _ = store.submit("place", {})
    service = registered(store)
    claimed = service.claim()
    assert claimed is not None
    assert service.asked_to_stop(claimed[1]) is False
    assert store.cancel(job.id).stopping
    assert service.asked_to_stop(claimed[1]) is True
    assert service.finish(claimed[1], result="e" * 64)
    found = store.job(job.id)
    assert (found.state, found.result) == ("cancelled", "e" * 64)


def test_a_question_whose_workers_die_fails_with_the_reason(store: Store) -> None:
    job, _ = store.submit("place", {})
    service = registered(store)
    for i in range(MAX_DEATHS):
        claimed = service.claim()
        assert claimed is not None
        assert service.died(claimed[1], f"killed by SIGKILL {i}")
    found = store.job(job.id)
    assert (found.state, found.deaths) == ("failed", 2)
    assert found.error == "its worker ended without an answer 2 times, the last time killed by SIGKILL 1"


def test_a_service_that_stands_still_loses_its_jobs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(leasing.time, "monotonic", lambda: clock[0])
    job, _ = store.submit("place", {})
    lost, watching = registered(store), registered(store, patience=10)
    claimed = lost.claim()
    assert claimed is not None
    assert watching.take_over() == 0
    clock[0] += 9
    assert lost.beat()
    assert watching.take_over() == 0
    clock[0] += 9  # 18 seconds, but it was heard of 9 seconds ago
    assert watching.take_over() == 0
    clock[0] += 2
    assert watching.take_over() == 1
    assert not lost.beat()
    assert lost.asked_to_stop(claimed[1]) is None
    assert not lost.finish(claimed[1], result="a" * 64)
    assert lost.claim() is None  # it must register anew
    again = watching.claim()
    assert again is not None
    assert again[0].id == job.id
    assert watching.finish(again[1], result="b" * 64)
    assert store.job(job.id).result == "b" * 64


def test_times_of_day_decide_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = store.submit("place", {})
    service, other = registered(store, patience=10), registered(store, patience=10)
    for day in (1e9, 2e9, 5e8):
        monkeypatch.setattr(leasing.time, "time", lambda day=day: day)
        other.take_over()
    claimed = service.claim()
    assert claimed is not None
    monkeypatch.setattr(leasing.time, "time", lambda: 1.0)
    assert other.take_over() == 0
    assert service.finish(claimed[1], result="a" * 64)
    assert store.job(job.id).state == "done"


def test_a_service_that_ends_leaves_its_jobs_to_the_next(store: Store) -> None:
    job, _ = store.submit("place", {})
    first = registered(store)
    assert first.claim() is not None
    first.leave()
    found = store.job(job.id)
    assert (found.state, found.starts) == ("queued", 0)
    assert registered(store).claim() is not None


def test_what_is_lost_again_and_again_fails(store: Store) -> None:
    job, _ = store.submit("place", {})
    watching = registered(store, patience=1e-9)
    for _ in range(MAX_STARTS):
        lost = registered(store)
        assert lost.claim() is not None
        watching.take_over()
        watching.take_over()
    found = store.job(job.id)
    assert (found.state, found.starts) == ("failed", MAX_STARTS)
    assert "lost at each of 10 starts" in (found.error or "")


def test_a_process_that_has_ended_is_given_up_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _ = store.submit("place", {})
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lost, watching = Leases(store, 60.0), registered(store)
    with monkeypatch.context() as its:
        its.setattr(identity.os, "getpid", lambda: child.pid)
        lost.register()
    assert lost.claim() is not None
    assert watching.take_over() == 0
    child.communicate()
    assert watching.take_over() == 1
    assert store.job(job.id).state == "queued"
    assert not any(identity.gone(name) for name in ("", "x", "elsewhere ns 1 2", identity.here()))


def test_jobs_of_a_service_without_a_row_are_queued(store: Store) -> None:
    job, _ = store.submit("place", {})
    lost = registered(store)
    assert lost.claim() is not None
    with store.database.write() as connection:
        connection.execute(delete(services).where(services.c.id == lost.owner))
    registered(store).take_over()
    assert store.job(job.id).state == "queued"


def test_lists(store: Store) -> None:
    made = [store.submit(kind, {"i": i})[0] for i, kind in enumerate(("place", "solve", "place"))]
    store.cancel(made[0].id)
    assert [job.id for job in store.list_jobs()] == [job.id for job in made[::-1]]
    assert [job.id for job in store.list_jobs(["queued"], "place")] == [made[2].id]
    assert [job.id for job in store.list_jobs(before=made[1].number)] == [made[0].id]
    assert store.counts() == {"queued": 2, "running": 0, "done": 0, "failed": 0, "cancelled": 1}
    with pytest.raises(UnknownError, match="unknown"):
        store.job("0" * 32)


def test_documents(store: Store) -> None:
    made = store.add_document("a" * 64, "trace", "t.npz", "cafe", 7)
    assert store.add_document("a" * 64, "trace", "other.npz", "cafe", 7).name == "t.npz"
    with pytest.raises(ConflictError, match="in the store as a trace"):
        store.add_document("a" * 64, "cluster", "t.npz", "cafe", 7)
    with pytest.raises(UnknownError, match="is a trace, expected a cluster"):
        store.document("a" * 64, "cluster")
    assert store.document_of_content("trace", "cafe") == made
    assert store.document_of_content("trace", "beef") is None
    assert store.list_documents("trace") == [made]


def test_a_database_that_is_gone_is_unavailable(tmp_path: Path) -> None:
    gone = Database.postgresql("postgresql+psycopg://nobody@/nothing?host=/nowhere")
    with pytest.raises(UnavailableError, match="does not answer"):
        Store(gone).counts()
    with pytest.raises(MoeplanError, match="expected a folder"):
        Database.postgresql("mysql://x")


class Jobs(RuleBasedStateMachine):
    """Services that come, work, sleep, die and end, against the rules that a client relies on."""

    database: Database

    def __init__(self) -> None:
        super().__init__()
        emptied(self.database)
        self.store = Store(self.database)
        self.services = [registered(self.store)]
        self.held: list[tuple[Leases, leasing.Lease, str]] = []
        self.ended: dict[str, tuple[str, str | None, str | None]] = {}
        self.accepted: list[str] = []
        self.answers = 0

    @rule(question=st.integers(0, 3))
    def ask(self, question: int) -> None:
        job, new = self.store.submit("place", {"question": question})
        assert new == (job.id not in self.accepted)
        if new:
            self.accepted.append(job.id)

    @rule()
    def arrive(self) -> None:
        if len(self.services) < 4:
            self.services.append(registered(self.store))

    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        service = data.draw(st.sampled_from(self.services))
        if (found := service.claim()) is not None:
            self.held.append((service, found[1], found[0].id))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["result", "error", "died"]))
    def end(self, data: st.DataObject, how: str) -> None:
        held = data.draw(st.sampled_from(self.held))
        service, lease, job = held
        before = self.store.job(job)
        mine = before.state == "running" and (before.owner, before.starts) == (lease.owner, lease.start)
        self.answers += 1
        digest = f"{self.answers:064x}"
        took = service.died(lease, digest) if how == "died" else service.finish(lease, **{how: digest})
        assert took == mine

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """One is given up for dead; what it holds it may still try to end."""
        if len(self.services) < 2:
            return
        lost = data.draw(st.sampled_from(self.services))
        self.services.remove(lost)
        watching = Leases(self.store, -1.0)
        watching.owner = self.services[0].owner
        alive = {service.owner for service in self.services}
        watching.take_over()
        # All but the first look dead to it: those that live begin anew, as they do.
        for service in self.services:
            if not service.beat():
                service.register()
        assert lost.owner not in alive

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if self.accepted:
            job = data.draw(st.sampled_from(self.accepted))
            if self.store.job(job).state not in ("done", "failed"):
                self.store.cancel(job)

    @invariant()
    def what_has_ended_stays(self) -> None:
        known = {job.id: job for job in self.store.list_jobs(limit=1000)}
        assert list(known) == self.accepted[::-1]
        for job in known.values():
            if job.id in self.ended:
                assert self.ended[job.id] == (job.state, job.result, job.error)
            elif job.state in ENDED:
                self.ended[job.id] = (job.state, job.result, job.error)
            assert (job.owner is not None) == (job.state == "running")
            assert job.state != "failed" or job.error

    def teardown(self) -> None:
        """Whatever happened: a service that lives on brings every job to an end."""
        last = registered(self.store, patience=-1.0)
        last.take_over()
        for _ in range(100):
            if (found := last.claim()) is None:
                break
            assert last.finish(found[1], result="d" * 64)
        assert all(job.over for job in self.store.list_jobs(limit=1000))


def test_whatever_happens_every_job_ends_once(tmp_path: Path) -> None:
    database = Database.sqlite(tmp_path / "jobs.sqlite")
    database.migrate()

    class Here(Jobs):
        pass

    Here.database = database
    few = settings(max_examples=25, stateful_step_count=25, suppress_health_check=list(HealthCheck), deadline=None)
    run_state_machine_as_test(Here, settings=few)
    database.close()

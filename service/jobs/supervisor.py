"""Takes jobs from the store, has a pool run them, and sees to it that each ends.

One thread for each worker: claim, run, answer. One more raises the service's counter and looks for services that are no
more. Where the database does not answer, runs go on and their answers wait.
"""

import hashlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import TypeVar

from .errors import UnavailableError, UnknownError
from .files import Files
from .leases import Lease, Leases
from .pool import Outcome, Pool, Run, Work
from .progress import Progress
from .requests import DOCUMENTS, RESULTS, is_digest, time_limit_of
from .store import Job, Store

log = logging.getLogger("moeplan.jobs")
T = TypeVar("T")
LOOK = 0.25  # seconds between looks at a run, and for a new job
BEATS = 5  # in the time after which a service is given up
SLOW, START = 2.0, 120.0  # a run may take so many times its time limit, and so many seconds more


@dataclass
class Supervisor:
    """``start`` and ``close`` it once. grace: seconds between asking a run to stop and killing it; patience: after
    which a service that shows no sign of life is given up; folder: of files while they are made."""

    store: Store
    files: Files
    pool: Pool
    folder: Path
    workers: int = 2
    grace: float = 20.0
    patience: float = 15.0
    on_end: Callable[[str, str, float], None] = lambda kind, state, seconds: None
    leases: Leases = field(init=False)
    _ending: Event = field(init=False, default_factory=Event)
    _threads: list[Thread] = field(init=False, default_factory=list)

    def start(self) -> None:
        self.leases = Leases(self.store, self.patience)
        self.leases.register()
        self.leases.take_over()
        self._threads = [Thread(target=self._beat, name="beat", daemon=True)]
        self._threads += [Thread(target=self._work, name=f"worker {i}", daemon=True) for i in range(self.workers)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Kill what runs; its jobs are queued again, for the next service."""
        self._ending.set()
        for thread in self._threads:
            thread.join()
        try:
            self.leases.leave()
        except UnavailableError as error:  # others find out by the counter
            log.warning("left without saying so: %s", error)
        self.pool.close()

    @property
    def alive(self) -> bool:
        return bool(self._threads) and all(thread.is_alive() for thread in self._threads)

    def _beat(self) -> None:
        while not self._ending.wait(self.patience / BEATS):
            try:
                if not self.leases.beat():
                    log.warning("this service was given up for dead: it begins anew")
                    self.leases.register()
                if lost := self.leases.take_over():
                    log.warning("jobs of lost services are queued again", extra={"services": lost})
            except UnavailableError as error:
                log.error("%s", error)

    def _work(self) -> None:
        while not self._ending.is_set():
            try:
                claimed = self.leases.claim()
            except UnavailableError as error:
                log.error("%s", error)
                self._ending.wait(1.0)
                continue
            if claimed is None:
                self._ending.wait(LOOK)
                continue
            job, lease = claimed
            try:
                self._serve(job, lease)
            except Exception:  # a fault of this program must not take the worker with it
                log.exception("job %s", job.id)
                self._insist(partial(self.leases.died, lease, "by a fault of moeplan"))

    def _serve(self, job: Job, lease: Lease) -> None:
        began = time.monotonic()
        log.info("job started", extra={"job": job.id, "kind": job.kind, "start": lease.start})
        with tempfile.TemporaryDirectory(prefix="run-", dir=self.folder, ignore_cleanup_errors=True) as name:
            folder = Path(name)
            try:
                run = self.pool.start(Work(job.request, self._fetch(job, folder), folder))
            except UnknownError as error:
                text = str(error)
                self._insist(lambda: self.leases.finish(lease, error=text))
                return
            except (UnavailableError, OSError) as error:
                log.error("job %s cannot be started: %s", job.id, error)
                text = f"before it began: {error}"
                self._insist(lambda: self.leases.died(lease, text))
                return
            outcome = self._watch(run, job, lease)
            if outcome is None:
                return
            ended = self._answered(outcome, job, lease)
            seconds = time.monotonic() - began
            state = "lost" if not ended else "died" if outcome.died else "failed" if outcome.error else "answered"
            log.info("job ended", extra={"job": job.id, "kind": job.kind, "state": state, "seconds": round(seconds, 3)})
            if outcome.log.strip() and (outcome.died or "fault of moeplan" in (outcome.error or "")):
                log.warning("its worker's last words", extra={"job": job.id, "text": outcome.log})
            self.on_end(job.kind, state, seconds)

    def _fetch(self, job: Job, folder: Path) -> dict[str, Path]:
        named = {name: job.request.get(name) for name in DOCUMENTS}
        return {
            name: self.files.fetch(digest, folder)
            for name, digest in named.items()
            if isinstance(digest, str) and is_digest(digest)
        }

    def _watch(self, run: Run, job: Job, lease: Lease) -> Outcome | None:
        """Follow a run to its end; None where the lease is lost or the service ends."""
        progress, asked, looked, news = Progress(), 0.0, 0.0, False
        latest = time.monotonic() + SLOW * time_limit_of(job.request) + START
        while (outcome := run.outcome) is None:
            for event in run.wait(LOOK):
                progress.take(event)
                news = True
            now = time.monotonic()
            if self._ending.is_set():
                run.kill()
                return None
            if now > latest:
                run.kill()
                return Outcome(error="it took far longer than its time limit and was ended")
            if asked and now - asked > self.grace:
                run.kill()
                return Outcome(died="it did not end when asked to")
            if now - looked < LOOK:
                continue
            looked = now
            try:
                if news:
                    self.leases.tell(lease, progress.body)
                    news = False
                stopping = self.leases.asked_to_stop(lease)
            except UnavailableError:
                continue  # it goes on meanwhile
            if stopping is None:
                run.kill()
                log.warning("job %s was given to another service", job.id)
                return None
            if stopping and not asked:
                asked = now
                run.stop()
        if news:
            self._insist(lambda: self.leases.tell(lease, progress.body))
        return outcome

    def _answered(self, outcome: Outcome, job: Job, lease: Lease) -> bool:
        if outcome.result is not None:
            result = outcome.result
            digest = self._insist(lambda: self._keep(result, job))
            return digest is not None and bool(self._insist(lambda: self.leases.finish(lease, result=digest)))
        if outcome.error is not None:
            return bool(self._insist(lambda: self.leases.finish(lease, error=outcome.error)))
        return bool(self._insist(lambda: self.leases.died(lease, outcome.died or "")))

    def _keep(self, path: Path, job: Job) -> str:
        """The digest of a result, which is a document of the store then."""
        with open(path, "rb") as file:
            digest, size = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
        copy = path.with_name("kept")
        shutil.copyfile(path, copy)
        try:
            self.files.keep(copy, digest)
        except OSError as error:
            raise UnavailableError(f"the store's disk: {error.strerror or error}") from error
        return self.store.add_document(digest, RESULTS[job.kind], f"{job.kind} {job.id[:8]}", "", size).digest

    def _insist(self, change: Callable[[], T]) -> T | None:
        """Until the store answers, or the service ends: then others do this job again."""
        while True:
            try:
                return change()
            except UnavailableError as error:
                log.error("%s", error)
                if self._ending.wait(1.0):
                    return None

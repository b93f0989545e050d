"""What was asked, by whom it is worked on, and what came of it. Every change is one compare-and-set.

A job is queued, running, then done, failed or cancelled, and ends once. Who runs it holds a lease: the service's id and
the number of the start. An update that names another lease changes nothing, so that an answer of a service that was
given up for dead is not taken. Whether a service lives is told by a counter that it raises, and by how long others saw
it stand still on their own monotonic clocks (``leases``): no time of day decides anything.
"""

import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, insert, select, update
from sqlalchemy.exc import IntegrityError

from .database import Database
from .errors import BusyError, ConflictError, UnknownError
from .tables import documents, jobs

QUEUED, RUNNING, DONE, FAILED, CANCELLED = STATES = ("queued", "running", "done", "failed", "cancelled")
ENDED = (DONE, FAILED, CANCELLED)
MAX_DEATHS = 2  # a question whose worker dies twice is not tried again
MAX_STARTS = 10  # by then it may be what ends the services


@dataclass(frozen=True)
class Job:
    """One row; ``progress``: see ``progress.Progress``."""

    number: int
    id: str
    kind: str
    request: dict[str, Any]
    digest: str
    state: str
    stopping: bool
    owner: str | None
    starts: int
    deaths: int
    version: int
    progress: dict[str, Any]
    result: str | None
    error: str | None
    created: float
    started: float | None
    ended: float | None

    @property
    def over(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True)
class StoredDocument:
    """One row; ``content``: the digest that other documents know it by."""

    digest: str
    kind: str
    name: str
    content: str
    bytes: int
    created: float


class Store:
    """Every method raises UnavailableError where the database does not answer."""

    def __init__(self, database: Database, max_queued: int = 1000) -> None:
        self.database, self.max_queued = database, max_queued

    # Documents

    def add_document(self, digest: str, kind: str, name: str, content: str, size: int) -> StoredDocument:
        """The document's row: a new one, or the one that is there."""
        row = {"digest": digest, "kind": kind, "name": name, "content": content, "bytes": size, "created": time.time()}
        try:
            with self.database.write() as connection:
                connection.execute(insert(documents).values(row))
        except IntegrityError:
            known = self.document(digest)
            if known.kind != kind:
                raise ConflictError(f"document {digest[:16]}: it is in the store as a {known.kind}") from None
            return known
        return StoredDocument(**row)  # type: ignore[arg-type]

    def document(self, digest: str, kind: str | None = None) -> StoredDocument:
        """Raises UnknownError where there is none, of that kind if given."""
        with self.database.read() as connection:
            row = connection.execute(select(documents).where(documents.c.digest == digest)).mappings().first()
        if row is None:
            raise UnknownError(f"document {digest[:16]}: unknown; send it first")
        if kind is not None and row["kind"] != kind:
            raise UnknownError(f"document {digest[:16]}: is a {row['kind']}, expected a {kind}")
        return StoredDocument(**row)

    def document_of_content(self, kind: str, content: str) -> StoredDocument | None:
        """The latest that other documents know by this digest."""
        query = select(documents).where(documents.c.kind == kind, documents.c.content == content)
        with self.database.read() as connection:
            row = connection.execute(query.order_by(documents.c.created.desc()).limit(1)).mappings().first()
        return None if row is None else StoredDocument(**row)

    def list_documents(self, kind: str | None = None, limit: int = 100) -> list[StoredDocument]:
        """The latest first."""
        query = select(documents).order_by(documents.c.created.desc(), documents.c.digest).limit(limit)
        if kind is not None:
            query = query.where(documents.c.kind == kind)
        with self.database.read() as connection:
            return [StoredDocument(**row) for row in connection.execute(query).mappings()]

    # Jobs, as those who ask see them

    def submit(self, kind: str, request: dict[str, Any], salt: str = "") -> tuple[Job, bool]:
        """The job that answers this question, and whether it is new. ``salt``: what else an answer depends on.

        The same question has one answer: a job that has it, or will have it, is not made again. Raises BusyError where
        too many wait.
        """
        body = json.dumps(request, sort_keys=True, allow_nan=False)
        digest = hashlib.sha256(f"{kind}\n{salt}\n{body}".encode()).hexdigest()
        while True:
            known = self._answering(digest)
            if known is not None:
                return known, False
            try:
                return self._insert(kind, body, digest), True
            except IntegrityError:  # someone asked the same meanwhile
                continue

    def _answering(self, digest: str) -> Job | None:
        answers = jobs.c.state.in_((QUEUED, RUNNING, DONE)) & (jobs.c.stopping == 0)
        with self.database.read() as connection:
            row = connection.execute(select(jobs).where(jobs.c.digest == digest, answers)).mappings().first()
        return None if row is None else _job(row)

    def _insert(self, kind: str, body: str, digest: str) -> Job:
        job = secrets.token_hex(16)
        with self.database.write() as connection:
            waiting = connection.execute(select(func.count()).where(jobs.c.state == QUEUED)).scalar_one()
            if waiting >= self.max_queued:
                raise BusyError(f"{waiting} jobs wait already; try again later")
            connection.execute(
                insert(jobs).values(
                    id=job,
                    kind=kind,
                    request=body,
                    digest=digest,
                    state=QUEUED,
                    stopping=0,
                    starts=0,
                    deaths=0,
                    version=0,
                    progress="{}",
                    created=time.time(),
                )
            )
        return self.job(job)

    def job(self, job: str) -> Job:
        """Raises UnknownError."""
        with self.database.read() as connection:
            row = connection.execute(select(jobs).where(jobs.c.id == job)).mappings().first()
        if row is None:
            raise UnknownError(f"job {job[:32]}: unknown")
        return _job(row)

    def list_jobs(
        self, states: Sequence[str] = (), kind: str | None = None, limit: int = 100, before: int | None = None
    ) -> list[Job]:
        """The latest first; before: only those with a smaller number."""
        query = select(jobs).order_by(jobs.c.number.desc()).limit(limit)
        if states:
            query = query.where(jobs.c.state.in_(states))
        if kind is not None:
            query = query.where(jobs.c.kind == kind)
        if before is not None:
            query = query.where(jobs.c.number < before)
        with self.database.read() as connection:
            return [_job(row) for row in connection.execute(query).mappings()]

    def counts(self) -> dict[str, int]:
        """How many jobs are in each state."""
        with self.database.read() as connection:
            rows = connection.execute(select(jobs.c.state, func.count()).group_by(jobs.c.state)).all()
        return dict.fromkeys(STATES, 0) | {row[0]: row[1] for row in rows}

    def cancel(self, job: str) -> Job:
        """A queued job is cancelled; a running one is asked to end with the best found, and is cancelled then.

        Raises UnknownError, and ConflictError for a job that is done or has failed.
        """
        with self.database.write() as connection:
            ended = {"state": CANCELLED, "ended": time.time(), "version": jobs.c.version + 1}
            asked = {"stopping": 1, "version": jobs.c.version + 1}
            queued = connection.execute(update(jobs).where(jobs.c.id == job, jobs.c.state == QUEUED).values(ended))
            if not queued.rowcount:
                running = (jobs.c.id == job) & (jobs.c.state == RUNNING) & (jobs.c.stopping == 0)
                connection.execute(update(jobs).where(running).values(asked))
        found = self.job(job)
        if found.state in (DONE, FAILED):
            raise ConflictError(f"job {job}: it is {found.state} already")
        return found


def _job(row: Any) -> Job:
    fields = dict(row)
    fields["request"], fields["progress"] = json.loads(fields["request"]), json.loads(fields["progress"])
    return Job(**fields | {"stopping": bool(fields["stopping"])})

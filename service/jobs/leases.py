"""Who works on what: claims, answers, and jobs of services that are no more.

A service raises its counter every few seconds. Another that sees the counter stand still for ``patience`` seconds of
its own monotonic clock takes its row away, if the counter is still the same, and in the same transaction its jobs are
queued again. The first one, should it only have slept, finds its row gone, gives up what it runs and begins under a new
id. A service whose process on this machine has surely ended is given up at once.
"""

import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, insert, select, update

from .identity import gone, here
from .store import CANCELLED, DONE, FAILED, MAX_DEATHS, MAX_STARTS, QUEUED, RUNNING, Job, Store
from .tables import jobs, services


@dataclass(frozen=True)
class Lease:
    """The right to change a running job."""

    number: int
    owner: str
    start: int

    @property
    def holds(self) -> ColumnElement[bool]:
        return and_(
            jobs.c.number == self.number,
            jobs.c.state == RUNNING,
            jobs.c.owner == self.owner,
            jobs.c.starts == self.start,
        )


class Leases:
    """Of one service."""

    def __init__(self, store: Store, patience: float) -> None:
        """patience: seconds after which a service whose counter stands still is given up."""
        self.database, self.store, self.patience = store.database, store, patience
        self.owner = ""
        self._seen: dict[str, tuple[int, float]] = {}

    def register(self) -> None:
        """Begin under a new id."""
        owner = secrets.token_hex(16)
        with self.database.write() as connection:
            connection.execute(insert(services).values(id=owner, beat=0, place=here()))
        self.owner = owner

    def beat(self) -> bool:
        """Raise the counter; False where others have given this service up: ``register`` again."""
        with self.database.write() as connection:
            mine = update(services).where(services.c.id == self.owner).values(beat=services.c.beat + 1)
            return connection.execute(mine).rowcount == 1

    def leave(self) -> None:
        """Jobs that still run are queued again, and this start is not counted."""
        with self.database.write() as connection:
            connection.execute(delete(services).where(services.c.id == self.owner))
            self._requeue(connection, self.owner, counted=False)

    def take_over(self) -> int:
        """Queue the jobs of services that stand still, and of those without a row; how many services were given up."""
        with self.database.read() as connection:
            rows = connection.execute(select(services)).all()
            known = {row.id: row.beat for row in rows}
            running = connection.execute(select(jobs.c.owner).where(jobs.c.state == RUNNING).distinct())
            orphans = {owner for (owner,) in running} - known.keys()
        now = time.monotonic()
        self._seen = {
            owner: seen if (seen := self._seen.get(owner)) is not None and seen[0] == beat else (beat, now)
            for owner, beat in known.items()
        }
        lost = 0
        ended = {row.id for row in rows if gone(row.place)}
        for owner, (beat, since) in self._seen.items():
            if owner != self.owner and (owner in ended or now - since > self.patience):
                lost += self._give_up(owner, beat)
        for owner in orphans:
            with self.database.write() as connection:
                alive = connection.execute(select(services.c.id).where(services.c.id == owner)).first()
                if alive is None:
                    self._requeue(connection, owner, counted=True)
        return lost

    def _give_up(self, owner: str, beat: int) -> bool:
        with self.database.write() as connection:
            still = (services.c.id == owner) & (services.c.beat == beat)
            if not connection.execute(delete(services).where(still)).rowcount:
                return False
            self._requeue(connection, owner, counted=True)
        return True

    def _requeue(self, connection: Connection, owner: str, counted: bool) -> None:
        """End what was asked to stop or was started too often; queue the rest."""
        mine, now = (jobs.c.owner == owner) & (jobs.c.state == RUNNING), time.time()
        ended = {"owner": None, "ended": now, "version": jobs.c.version + 1}
        connection.execute(update(jobs).where(mine, jobs.c.stopping == 1).values(ended | {"state": CANCELLED}))
        if counted:
            error = f"given up: the service that ran it was lost at each of {MAX_STARTS} starts"
            often = update(jobs).where(mine, jobs.c.starts >= MAX_STARTS)
            connection.execute(often.values(ended | {"state": FAILED, "error": error}))
        again: dict[str, Any] = {"state": QUEUED, "owner": None, "version": jobs.c.version + 1, "progress": "{}"}
        if not counted:
            again["starts"] = jobs.c.starts - 1
        connection.execute(update(jobs).where(mine).values(again))

    # One job

    def claim(self) -> tuple[Job, Lease] | None:
        """The job that waits longest; None where none does."""
        with self.database.read() as connection:
            first = select(jobs.c.number).where(jobs.c.state == QUEUED).order_by(jobs.c.number).limit(1)
            if connection.execute(first).first() is None:
                return None
        with self.database.write() as connection:
            row = connection.execute(
                select(jobs.c.number, jobs.c.id, jobs.c.starts)
                .where(jobs.c.state == QUEUED)
                .order_by(jobs.c.number)
                .limit(1)
                .with_for_update(skip_locked=True)  # SQLite has its lock already
            ).first()
            alive = connection.execute(select(services.c.id).where(services.c.id == self.owner)).first()
            if row is None or alive is None:
                return None
            lease = Lease(row.number, self.owner, row.starts + 1)
            mine = {"state": RUNNING, "owner": self.owner, "starts": row.starts + 1, "version": jobs.c.version + 1}
            queued = (jobs.c.number == row.number) & (jobs.c.state == QUEUED) & (jobs.c.starts == row.starts)
            if not connection.execute(update(jobs).where(queued).values(mine | {"started": time.time()})).rowcount:
                return None
        return self.store.job(row.id), lease

    def tell(self, lease: Lease, progress: dict[str, Any]) -> None:
        """What watchers see."""
        text = json.dumps(progress, allow_nan=False)
        self._change(lease, progress=text)

    def asked_to_stop(self, lease: Lease) -> bool | None:
        """None where the lease is lost."""
        with self.database.read() as connection:
            row = connection.execute(select(jobs.c.stopping).where(lease.holds)).first()
        return None if row is None else bool(row.stopping)

    def finish(self, lease: Lease, result: str | None = None, error: str | None = None) -> bool:
        """End it: failed with an error; with a result done, or cancelled where it was asked to stop.

        False where the lease is lost: someone else ends it.
        """
        now, version = time.time(), jobs.c.version + 1
        common = {"result": result, "error": error, "ended": now, "version": version, "owner": None}
        with self.database.write() as connection:
            stopped = update(jobs).where(lease.holds, jobs.c.stopping == 1)
            if connection.execute(stopped.values(common | {"state": CANCELLED})).rowcount:
                return True
            state = DONE if error is None else FAILED
            return connection.execute(update(jobs).where(lease.holds).values(common | {"state": state})).rowcount == 1

    def died(self, lease: Lease, reason: str) -> bool:
        """Its worker ended without an answer: it is tried once more, then fails with the reason. False: lease lost."""
        now, version = time.time(), jobs.c.version + 1
        with self.database.write() as connection:
            common = {"owner": None, "deaths": jobs.c.deaths + 1, "version": version}
            stopped = update(jobs).where(lease.holds, jobs.c.stopping == 1)
            if connection.execute(stopped.values(common | {"state": CANCELLED, "ended": now})).rowcount:
                return True
            last = update(jobs).where(lease.holds, jobs.c.deaths + 1 >= MAX_DEATHS)
            error = f"its worker ended without an answer {MAX_DEATHS} times, the last time {reason}"
            if connection.execute(last.values(common | {"state": FAILED, "error": error, "ended": now})).rowcount:
                return True
            again = update(jobs).where(lease.holds).values(common | {"state": QUEUED, "progress": "{}"})
            return connection.execute(again).rowcount == 1

    def _change(self, lease: Lease, **values: Any) -> bool:
        with self.database.write() as connection:
            change = update(jobs).where(lease.holds).values(values | {"version": jobs.c.version + 1})
            return connection.execute(change).rowcount == 1

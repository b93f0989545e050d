"""The store's database: SQLite in a file by default, PostgreSQL by its URL; tables are brought up to date at start."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, TimeoutError

from ...spec.errors import MoeplanError
from .errors import UnavailableError
from .settings import POSTGRESQL

LOCK_WAIT = 20.0  # seconds that a writer waits for another
CONNECTIONS = 20
MIGRATION_LOCK = 0x6D6F65706C616E  # of PostgreSQL's advisory locks, one for all services on a database
DAMAGED = ("file is not a database", "disk image is malformed")  # what SQLite says of a file that waiting does not mend


class Database:
    """Transactions on one database, for any number of threads."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def sqlite(cls, path: Path) -> "Database":
        """The file is made where it is missing, readable by its owner only."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.close(descriptor)
        engine = create_engine(f"sqlite:///{path}", pool_size=CONNECTIONS, connect_args={"timeout": LOCK_WAIT})
        event.listen(engine, "connect", _prepare)
        event.listen(engine, "begin", _begin)
        return cls(engine)

    @classmethod
    def postgresql(cls, url: str) -> "Database":
        """Raises MoeplanError for a URL of another kind."""
        try:
            parsed = make_url(url)
        except ArgumentError:
            raise MoeplanError(f"--store: not a URL; expected {POSTGRESQL}://USER@HOST/DATABASE") from None
        if parsed.drivername != POSTGRESQL:
            raise MoeplanError(f"--store {parsed.drivername}://...: expected a folder, or {POSTGRESQL}://...")
        options = {"connect_timeout": 5, "options": "-c lock_timeout=20s -c statement_timeout=30s"}
        return cls(
            create_engine(parsed, pool_pre_ping=True, pool_size=CONNECTIONS, pool_timeout=10, connect_args=options)
        )

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction. Raises UnavailableError where the database does not answer; nothing is changed then."""
        with _answering(), self.engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads: it waits for no writer."""
        with _answering(), self.engine.connect() as connection:
            yield connection.execution_options(moeplan_reads=True)

    def migrate(self) -> None:
        """Bring the tables up to date; of several services that start at once, one after the other does.

        Raises MoeplanError for tables of a later version.
        """
        from alembic.command import upgrade
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
        with self.write() as connection:  # of SQLite this has its lock already
            if self.engine.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            config.attributes["connection"] = connection
            try:
                upgrade(config, "head")
            except CommandError as error:
                raise MoeplanError(
                    f"the store is of another version of moeplan ({error}): use that version, or name another --store"
                ) from None

    def close(self) -> None:
        self.engine.dispose()


def _prepare(connection: Any, record: object) -> None:
    """WAL lets readers read while one writes; FULL keeps what was accepted through a loss of power."""
    connection.isolation_level = None  # transactions begin where ``_begin`` says
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "trusted_schema=OFF", "cell_size_check=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    """A transaction that will write takes the lock at its beginning: taken later it could only fail."""
    reads = connection.get_execution_options().get("moeplan_reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except (DBAPIError, TimeoutError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        if any(words in reason for words in DAMAGED):
            raise UnavailableError(
                f"the store's jobs.sqlite cannot be used ({reason}): restore it, or name another --store"
            ) from error
        raise UnavailableError(f"the store's database does not answer ({reason}); try again later") from error

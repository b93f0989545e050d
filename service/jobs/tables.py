"""The store's tables. ``migrations`` makes them; a test compares the two.

Times of day are for people only. Nothing is decided by them: a clock may jump.
"""

from sqlalchemy import BigInteger, Column, Float, Index, Integer, MetaData, String, Table, Text, text

metadata = MetaData()

ANSWERS = "state IN ('queued', 'running', 'done') AND stopping = 0"
"""Jobs that answer, or will answer, their question: at most one for each question."""

documents = Table(
    "documents",
    metadata,
    Column("digest", String(64), primary_key=True),  # SHA-256 of its bytes
    Column("kind", String(16), nullable=False),
    Column("name", Text, nullable=False),
    Column("content", String(64), nullable=False),  # what documents that refer to it say: its own digest
    Column("bytes", BigInteger, nullable=False),
    Column("created", Float, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("id", String(32), nullable=False, unique=True),
    Column("kind", String(16), nullable=False),
    Column("request", Text, nullable=False),
    Column("digest", String(64), nullable=False),  # SHA-256 of the question
    Column("state", String(16), nullable=False),
    Column("stopping", Integer, nullable=False),  # 1: asked to end with what is found
    Column("owner", String(32)),  # the service that runs it
    Column("starts", Integer, nullable=False),
    Column("deaths", Integer, nullable=False),  # of workers that ended without an answer
    Column("version", Integer, nullable=False),  # counts changes that a watcher sees
    Column("progress", Text, nullable=False),
    Column("result", String(64)),
    Column("error", Text),
    Column("created", Float, nullable=False),
    Column("started", Float),
    Column("ended", Float),
    Index("jobs_state", "state", "number"),
    Index("jobs_answer", "digest", unique=True, sqlite_where=text(ANSWERS), postgresql_where=text(ANSWERS)),
)

services = Table(
    "services",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("beat", BigInteger, nullable=False),  # counts up while the service lives
    Column("place", Text, nullable=False),
)

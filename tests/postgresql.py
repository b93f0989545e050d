"""A PostgreSQL server of its own, in a temporary folder, that only this machine's files lead to."""

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
QUICK = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "100"}


def binaries() -> Path:
    """Where its programs are; skips where there are none."""
    if BINARIES:
        return BINARIES[-1]
    found = shutil.which("initdb")
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    return Path(os.path.realpath(found)).parent


@contextmanager
def server() -> Iterator[str]:
    """The URL of a database, for SQLAlchemy. As root it runs as another user: PostgreSQL demands that."""
    programs = binaries()
    root = Path(tempfile.mkdtemp(prefix="moeplan-pg-"))
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:
        user = next(entry for entry in pwd.getpwall() if entry.pw_name in ("postgres", "nobody"))
        os.chown(root, user.pw_uid, user.pw_gid)
        as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    data = root / "data"
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": root, **as_user}
    made: list[str | Path] = [
        programs / "initdb",
        "-D",
        data,
        "-U",
        "moeplan",
        "-A",
        "trust",
        "-E",
        "UTF8",
        "--no-sync",
    ]
    subprocess.run(made, check=True, timeout=120, **options)
    settings = [f"-c{name}={value}" for name, value in QUICK.items()]
    with open(root / "log", "wb") as log:
        process = subprocess.Popen(
            [programs / "postgres", "-D", data, "-k", root, "-c", "listen_addresses=", *settings],
            **options | {"stderr": log},
        )
    try:
        _wait(programs, root, process)
        yield f"postgresql+psycopg://moeplan@/postgres?host={root}"
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(root, ignore_errors=True)


def _wait(programs: Path, root: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while subprocess.run([programs / "pg_isready", "-q", "-h", root], check=False, timeout=30).returncode:
        assert process.poll() is None, (root / "log").read_text()[-2000:]
        assert time.monotonic() < until, "PostgreSQL did not start"
        time.sleep(0.1)

"""Services for tests: in this process, and as the command on a port of this machine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import uvicorn
from starlette.testclient import TestClient

from moeplan.service.http.app import create_app
from moeplan.service.http.serve import Server
from moeplan.service.jobs.settings import Settings

URL = "http://127.0.0.1:8321"
PATIENCE = 120.0  # seconds that a busy machine may take


@contextmanager
def in_process(folder: Path, **settings: Any) -> Iterator[TestClient]:
    """A client of an app whose workers run."""
    given = {"workers": 1, "requests_a_minute": 100_000} | settings
    with TestClient(create_app(Settings(str(folder), **given)), base_url=URL) as client:
        yield client


def finished(client: httpx.Client, job: str) -> dict[str, Any]:
    """The job once it is over."""
    until = time.monotonic() + PATIENCE
    while (found := client.get(f"/v1/jobs/{job}").json())["state"] in ("queued", "running"):
        assert time.monotonic() < until, found
        time.sleep(0.05)
    return found


class Served:
    """``moeplan serve`` in a process of its own."""

    def __init__(self, store: str, *options: str, **environment: str) -> None:
        command = [sys.executable, "-m", "moeplan", "serve", "--port", "0", "--store", store, *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+?:\d+", line)
        if found is None:
            self.process.kill()
            raise AssertionError(line + self.process.communicate()[1])
        self.url = found[0]

    def end(self, number: int = signal.SIGINT) -> tuple[int, str]:
        """Exit code, and what it wrote to standard error."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, err

    def workers(self) -> list[int]:
        """Process ids of its workers."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found = []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            try:
                found += [int(pid) for pid in (task / listed.name).read_text().split()]
            except OSError:
                continue
        return found


@contextmanager
def served(store: str | Path, *options: str, **environment: str) -> Iterator[Served]:
    found = Served(str(store), *options, **environment)
    try:
        yield found
    finally:
        if found.process.poll() is None:
            found.process.kill()
            found.process.communicate()


def events(client: httpx.Client, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of each server-sent event of a job."""
    with client.stream("GET", f"/v1/jobs/{job}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                yield name, json.loads(line[6:])


@contextmanager
def threaded(store: Path | str, **settings: Any) -> Iterator[str]:
    """The URL of an app that a thread of this process serves on a port of this machine."""
    given = {"workers": 1, "requests_a_minute": 10_000_000} | settings
    app = create_app(Settings(str(store), **given))
    server = Server(uvicorn.Config(app, log_level="error", lifespan="on", timeout_graceful_shutdown=2), app)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until = time.monotonic() + PATIENCE
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < until
            time.sleep(0.05)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            app.state.ending.set()
            server.should_exit = True
            thread.join(PATIENCE)

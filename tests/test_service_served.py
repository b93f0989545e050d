"""`moeplan serve` as a process: clients, restarts, kills, cancellation."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread, Timer

import httpx
import pytest

pytest.importorskip("fastapi")
from moeplan import Client, MoeplanError, Placement, Trace, place
from moeplan.service import extra
from moeplan.tests.killing_services import Kills
from moeplan.tests.postgresql import server
from moeplan.tests.routings import chained_trace
from moeplan.tests.services import PATIENCE, Served, finished, served

LONG = {"devices": 4, "steps": 2_000_000_000, "time_limit": 600}
SHORT = {"kind": "place", "devices": 2, "steps": 100, "time_limit": 20}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chained_trace(0, 2, 4, 512, 1).write(tmp_path_factory.mktemp("trace") / "trace.npz")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace that a search goes on with until it is stopped."""
    return chained_trace(0, 6, 32, 1024, 2).write(tmp_path_factory.mktemp("large") / "trace.npz")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("store") / "jobs") as found:
        yield found


def command(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moeplan", *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def running(client: httpx.Client, job: str, starts: int = 1) -> None:
    """Wait until a job was started so often, and has told something since."""
    until = time.monotonic() + PATIENCE
    while not ((found := client.get(f"/v1/jobs/{job}").json())["progress"] and found["starts"] == starts):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert found["state"] == "running"


def test_a_client_has_the_librarys_answers(service: Served, trace: Path) -> None:
    told: list[dict] = []
    with Client(service.url) as client:
        mine = client.place(trace, devices=2, fit=(0, 0.5), steps=200, time_limit=30, on_event=told.append)
        theirs = place(trace, devices=2, fit=(0, 0.5), steps=200, time_limit=30)
        assert mine.layers == theirs.layers
        assert mine.scores == theirs.scores
        assert mine.trace == theirs.trace
        assert told
        again = client.place(trace, devices=2, fit=(0, 0.5), steps=200, time_limit=30)
        assert again == mine  # the answer that is there
        other = client.place(Trace.read(trace), devices=2, fit=(0, 0.5), steps=200, time_limit=30)
        assert other.layers == mine.layers
        assert client.explain(mine, trace).fit == mine.scores["placement"].fit
        with pytest.raises(MoeplanError, match=r"^4 experts need 4 slots, got 3: raise --slots$"):
            client.place(trace, devices=2, slots=3)
        with pytest.raises(MoeplanError, match=r"nothing\.npz: no such file"):
            client.place("nothing.npz")


def test_commands_do_the_same_elsewhere(service: Served, trace: Path, tmp_path: Path) -> None:
    folders = {}
    for where, options in {"here": (), "there": ("--server", service.url)}.items():
        folder = folders[where] = tmp_path / where
        folder.mkdir()
        words = ("place", "--trace", trace, "--devices", 2, "--steps", 200, "--time-limit", 30, "--equal-slots")
        done = command(*options, *words, cwd=folder)
        assert done.returncode == 0, done.stderr
        (folder / "explained").write_text(command(*options, "explain", "place.json", "--json", cwd=folder).stdout)
    here, there = (Placement.read(folder / "place.json") for folder in folders.values())
    assert here.model_copy(update={"solver": there.solver}) == there
    explained = [json.loads((folder / "explained").read_text())["explanation"] for folder in folders.values()]
    assert explained[0] == explained[1]
    refused = command("--server", service.url, "run", "place.json", cwd=tmp_path)
    assert (refused.returncode, "run works on this machine" in refused.stderr) == (2, True)


def test_a_wrong_server_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for url, said in (
            (nobody, "does not answer"),
            ("ftp://x", "expected a URL"),
            ("", "expected a URL"),
            ("http://..", "expected a URL"),
            (f"http://{'a' * 64}.example", "expected a URL"),
            ("http://127.0.0.1:1?x", "expected a URL"),
            ("http://[::1", "expected a URL"),
        ):
            with pytest.raises(MoeplanError, match=said), Client(url, patience=0.1) as client:
                client.jobs()


@contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """The URL of a server that gives these bytes, one for each connection, and closes it; the last again and again."""

    def answer(listener: socket.socket) -> None:
        left = list(answers)
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(ConnectionError):  # a client need not read to the end
                    connection.recv(2**16)
                    connection.sendall(left.pop(0) if len(left) > 1 else left[0])
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(2**16)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=answer, args=(listener,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b"{}", b'"jobs"', b"\xff", b"[" * 100_000])
def test_a_server_that_is_not_moeplan_is_one_line(trace: Path, body: bytes) -> None:
    with answering(whole(body)) as url, Client(url, patience=1) as client:
        for call in (client.jobs, lambda: client.cancel("0"), lambda: client.place(trace, devices=2)):
            with pytest.raises(MoeplanError, match=r"^http://\S+: something answers there that is no moeplan service"):
                call()


def test_an_answer_that_is_cut_is_fetched_again() -> None:
    answer = whole(b'{"kind": "place"}')
    with answering(answer[:-5], answer) as url, Client(url, patience=20) as client:
        assert client.connection.result("0") == '{"kind": "place"}'
    cut = pytest.raises(MoeplanError, match=r"does not answer \(peer closed connection")
    with answering(answer[:-5]) as url, Client(url, patience=1) as client, cut:
        client.connection.result("0")


def test_a_path_that_a_service_does_not_have_is_one_line(service: Served) -> None:
    with (
        pytest.raises(MoeplanError, match="check the URL, which ends in the port"),
        Client(f"{service.url}/x") as client,
    ):
        client.jobs()


def test_a_search_that_is_stopped_keeps_the_best_found(service: Served, large: Path) -> None:
    stop = Event()
    with Client(service.url) as client:
        Timer(4.0, stop.set).start()
        found = client.place(large, **LONG, seed=11, stop=stop)  # type: ignore[arg-type]
        (job,) = [job for job in client.jobs() if job["request"]["seed"] == 11]
    assert job["state"] == "cancelled"
    assert len(found.layers) == 6
    assert found.solver.seconds < 300


def test_it_ends_cleanly_and_goes_on_after_a_restart(large: Path, tmp_path: Path) -> None:
    with served(tmp_path / "jobs", "--workers", "1") as first, httpx.Client(base_url=first.url, timeout=60) as client:
        digest = client.post("/v1/traces", content=large.read_bytes()).json()["digest"]
        long = client.post("/v1/jobs", json={"kind": "place", "trace": digest} | LONG).json()["id"]
        waiting = client.post("/v1/jobs", json=SHORT | {"trace": digest}).json()["id"]
        running(client, long)
        (worker,) = first.workers()
        code, err = first.end()
        assert (code, "Traceback" in err) == (0, False), err
        assert "go on at the next start" in err
        assert not Path(f"/proc/{worker}").exists()
    with served(tmp_path / "jobs") as second, httpx.Client(base_url=second.url, timeout=60) as client:
        assert finished(client, waiting)["state"] == "done"
        running(client, long)
        assert client.get(f"/v1/jobs/{long}").json()["starts"] == 1
        assert second.end(signal.SIGTERM)[0] == 0


def test_workers_end_with_a_service_that_is_killed(large: Path, tmp_path: Path) -> None:
    with served(tmp_path / "jobs") as first, httpx.Client(base_url=first.url, timeout=60) as client:
        digest = client.post("/v1/traces", content=large.read_bytes()).json()["digest"]
        running(client, client.post("/v1/jobs", json={"kind": "place", "trace": digest} | LONG).json()["id"])
        (worker,) = first.workers()
        first.process.kill()
        until = time.monotonic() + PATIENCE
        while Path(f"/proc/{worker}").exists() and Path(f"/proc/{worker}/stat").read_text().split()[2] != "Z":
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_worker_that_is_killed_is_tried_once_more(large: Path, tmp_path: Path) -> None:
    with served(tmp_path / "jobs") as service, httpx.Client(base_url=service.url, timeout=60) as client:
        digest = client.post("/v1/traces", content=large.read_bytes()).json()["digest"]
        job = client.post("/v1/jobs", json={"kind": "place", "trace": digest} | LONG).json()["id"]
        for start in (1, 2):
            running(client, job, start)
            (worker,) = service.workers()
            os.kill(worker, signal.SIGKILL)
            while worker in service.workers():
                time.sleep(0.05)
        found = finished(client, job)
        assert (found["state"], found["starts"]) == ("failed", 2)
        assert "2 times, the last time killed by SIGKILL" in found["error"]


def test_killed_at_random_moments_no_job_is_lost(trace: Path, tmp_path: Path) -> None:
    kills = Kills(str(tmp_path / "jobs"), dict(SHORT), seed=1)
    ended = kills.run(4, trace)
    assert sum(ended.values()) == 4


def test_killed_at_random_moments_on_postgresql(trace: Path, tmp_path: Path) -> None:
    with server() as url:
        kills = Kills(url, dict(SHORT), seed=2, options=("--documents", str(tmp_path / "documents")))
        assert sum(kills.run(2, trace).values()) == 2


def test_what_it_cannot_start_with_is_one_line(service: Served, tmp_path: Path) -> None:
    port = service.url.rpartition(":")[2]
    foreign = tmp_path / "foreign"
    foreign.mkdir(mode=0o700)
    (foreign / "jobs.sqlite").write_text("no database")
    for words, said in (
        (("--port", port), "cannot be had (Address already in use)"),
        (("--host", "0.0.0.0"), "a token is needed"),
        (("--store", "mysql://x"), "expected a folder, or postgresql+psycopg://"),
        (("--store", "/proc/nothing"), "cannot be used as a store"),
        (("--store", "/dev/null"), "it is no folder"),
        (("--store", ""), "--store is empty"),
        (("--store", foreign), "(file is not a database): restore it, or name another --store"),
        (("--token-file", "nothing"), "nothing: no such file"),
    ):
        done = command("serve", "--store", tmp_path / "jobs", "--port", 0, *words, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert said in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr


def test_without_its_packages_it_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "find_spec", lambda name: None)
    with pytest.raises(MoeplanError, match=r"fastapi is not installed: pip install 'moeplan\[service\]'"):
        extra.check_service(*extra.NEEDED)
    with pytest.raises(MoeplanError, match=r"httpx is not installed"):
        Client()


def test_to_ask_a_service_httpx_is_enough(tmp_path: Path) -> None:
    """Where only it is installed, as other packages do: no part of the server is imported."""
    script = "import sys; sys.modules.update(dict.fromkeys(['sqlalchemy', 'alembic', 'fastapi', 'uvicorn'])); "
    script += "sys.argv = ['moeplan', '--server', 'http://127.0.0.1:1', 'place', '--trace', 'none.npz']; "
    script += "from moeplan.service.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, "none.npz: no such file" in done.stderr) == (2, True), done.stderr

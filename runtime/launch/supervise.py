"""Start the ranks' processes, watch them, and end all of them as soon as one fails or all fall silent."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from ...spec.errors import MoeplanError, RunError
from ..kernels.registry import choose
from .rank import Event, Seated, resolve_entry
from .signs import POLL, STOPPED, Starting, ask, own_frame, process_state, read_log

# After a first failure the others have this long to report theirs: the cause is often heard of after its consequence.
GRACE = 1.0
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class Seat:
    """Where and how one rank is to run. ``prefix`` is put before the interpreter (``ip netns exec NAME``)."""

    host: str
    cores: Sequence[int]
    threads: int
    cpu_share: float
    device: str = "cpu"
    prefix: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def seated(self) -> Seated:
        return Seated(self.host, self.device.partition(":")[0], self.cpu_share)


@dataclass
class Child:
    """One running rank, and what was heard from it."""

    rank: int
    seat: Seat
    process: subprocess.Popen[bytes]
    pipe: IO[bytes]
    log: IO[bytes]
    buffer: bytes = b""
    port: int | None = None
    ready: bool = False
    result: str | None = None
    error: Event | None = None
    ended: float | None = None

    @property
    def name(self) -> str:
        return f"rank {self.rank} (host {self.seat.host})"

    def failure(self) -> tuple[int, float, str] | None:
        """(how indirect it is, when, what) if this rank failed.

        Nothing that a peer does kills a rank by a signal, but for its own abort; an error may be that of a peer who
        lost this one; a broken connection always is.
        """
        if self.error is not None:
            return (3 if self.error["consequence"] else 1), self.ended or time.monotonic(), self.error["error"]
        if self.ended is None or self.result is not None:
            return None
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        how += " (out of memory?)" if code == -signal.SIGKILL else ""
        killed = code < 0 and code != -signal.SIGABRT
        return (0 if killed else 2), self.ended, f"{how} without a result"


class Supervisor:
    """Runs one entry over seats. The ranks' logs are files without a name, which end with their last reader; they are
    kept under one only if the run fails."""

    def __init__(self, seats: Sequence[Seat], address: str, port: int = 0) -> None:
        self.seats = seats
        self.address = address
        self.port = port
        self.children: list[Child] = []
        self.pipes = selectors.DefaultSelector()

    def run(
        self,
        entry: str,
        job: dict[str, Any],
        timeout: float,
        on_event: Callable[[Event], None] | None,
        before: Callable[[list[int]], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> list[dict[str, Any]]:
        """See ``Launcher.run``. ``before`` gets the ranks' process ids when all are ready and is left at the end."""
        resolve_entry(entry)  # a wrong name fails here, before anything is started
        for kind in sorted({seat.device.split(":")[0] for seat in self.seats}):
            choose(None, kind, torch.float32)  # kernels are built here, once, not by ranks that are being timed
        try:
            for rank, seat in enumerate(self.seats):
                self.children.append(self.start(rank, seat, entry))
            self.watch_start(timeout)
            with before([child.process.pid for child in self.children]):
                order = {"job": job, "timeout": timeout, "port": self.children[0].port}
                for child in self.children:
                    self.tell(child, order)
                self.watch(timeout, on_event)
            results = [json.loads(child.result or "") for child in self.children]
        finally:
            self.kill()
        return results

    def start(self, rank: int, seat: Seat, entry: str) -> Child:
        read, write = os.pipe()
        log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by `kill`
        threads = dict.fromkeys(THREADS, str(seat.threads))
        process = subprocess.Popen(
            [*seat.prefix, sys.executable, "-P", "-m", "moeplan.runtime.child", str(write)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | threads | seat.environment,
            pass_fds=(write,),
            start_new_session=True,  # Ctrl-C reaches the launcher alone, and a rank's own children die with it
        )
        os.close(write)
        os.set_blocking(read, False)
        os.sched_setaffinity(process.pid, seat.cores)  # before it has a second thread: all of them inherit it
        child = Child(rank, seat, process, os.fdopen(read, "rb", buffering=0), log)
        self.pipes.register(child.pipe, selectors.EVENT_READ, child)
        me = {
            "entry": entry,
            "rank": rank,
            "world": len(self.seats),
            "hosts": [s.host for s in self.seats],
            "device": seat.device,
            "threads": seat.threads,
            "cpu_share": seat.cpu_share,
            "address": self.address,
            "port": self.port,
            "parent": os.getpid(),
        }
        self.tell(child, me)
        return child

    def tell(self, child: Child, message: dict[str, Any]) -> None:
        assert child.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: the watch names it
            child.process.stdin.write(json.dumps(message).encode() + b"\n")
            child.process.stdin.flush()

    def watch_start(self, timeout: float) -> None:
        """Return when every rank is ready; raise RunError when one fails or does nothing for ``timeout`` seconds."""
        signs = Starting([child.process.pid for child in self.children])
        while waiting := [child for child in self.children if not child.ready]:
            self.listen(None)
            if any(child.failure() for child in self.children):
                self.fail()
            for child in waiting:
                if not child.ready and signs.silence(child.process.pid) > timeout:
                    self.lose(child, timeout, "while it started")

    def watch(self, timeout: float, on_event: Callable[[Event], None] | None) -> None:
        """Return when every rank has a result; raise RunError at the first failure or after ``timeout`` of silence."""
        heard = time.monotonic()
        while waiting := [child for child in self.children if child.result is None]:
            if self.listen(on_event):
                heard = time.monotonic()
            if any(child.failure() for child in self.children):
                self.fail()
            if time.monotonic() - heard > timeout:
                self.fail_silent(waiting, timeout)

    def listen(self, on_event: Callable[[Event], None] | None) -> bool:
        """Read what the ranks sent within a moment; whether there was anything, an end included."""
        heard = False
        for key, _ in self.pipes.select(POLL):
            heard |= self.read(key.data, on_event)
        for child in self.children:
            if child.ended is None and child.process.poll() is not None:
                self.read(child, on_event)
                child.ended = time.monotonic()
                heard = True
        return heard

    def read(self, child: Child, on_event: Callable[[Event], None] | None) -> bool:
        heard = False
        while (chunk := child.pipe.read(1 << 16)) is not None:
            if not chunk:
                with contextlib.suppress(KeyError):
                    self.pipes.unregister(child.pipe)
                break
            heard = True
            *lines, child.buffer = (child.buffer + chunk).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if message["kind"] == "ready":
                    child.ready, child.port = True, message["port"]
                elif message["kind"] == "event":
                    if child.rank == 0 and on_event:
                        on_event(message["event"])
                elif message["kind"] == "result":
                    child.result = message["result"]
                else:
                    child.error, child.ended = message, time.monotonic()
        return heard

    def fail(self) -> None:
        """Name the most direct failure, after the others had time to report theirs."""
        until = time.monotonic() + GRACE
        while time.monotonic() < until and not any((f := child.failure()) and f[0] == 0 for child in self.children):
            self.listen(None)
        failures = [(*failure, child) for child in self.children if (failure := child.failure())]
        _, _, what, child = min(failures, key=lambda f: f[:2])
        if child.error and child.error["expected"]:  # bad input that only a rank could see, such as other devices
            raise MoeplanError(f"{child.name}: {what}") from None
        raise RunError(f"{child.name}: {what}; its log: {self.keep_logs() / log_name(child)}") from None

    def fail_silent(self, waiting: list[Child], timeout: float) -> None:
        """Name the rank that is stopped, or does not answer, or else one that does not merely wait for another."""
        pids = [child.process.pid for child in waiting]
        stacks = ask(pids, [child.log for child in waiting])

        def innocence(i: int) -> int:
            stopped = process_state(pids[i])[0] in STOPPED
            return 0 if stopped else 1 if not stacks[i] else 3 if stacks[i][0].meets else 2

        lost = min(range(len(waiting)), key=innocence)
        frame = own_frame(stacks[lost])
        self.lose(waiting[lost], timeout, f"last in {frame}" if frame else "")

    def lose(self, child: Child, timeout: float, where: str) -> None:
        """Raise RunError for a silent rank. where: what is known of it."""
        pid = child.process.pid
        stopped = process_state(pid)[0] in STOPPED
        known = f"its process {pid} is stopped" if stopped else where
        at = f" ({known})" if known else ""
        log = self.keep_logs() / log_name(child)
        raise RunError(f"{child.name}: no sign of life for {timeout:g} s{at}; its log: {log}") from None

    def keep_logs(self) -> Path:
        """Write the ranks' logs, what they have of them, into a new folder."""
        folder = Path(tempfile.mkdtemp(prefix="moeplan-run-"))
        for child in self.children:
            (folder / log_name(child)).write_text(read_log(child.log))
        return folder

    def kill(self) -> None:
        """End every child with all that it started; returns when they are gone."""
        for child in self.children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.process.pid, signal.SIGKILL)
        for child in self.children:
            child.process.wait()
            child.pipe.close()
            child.log.close()
            if child.process.stdin:
                with contextlib.suppress(BrokenPipeError):
                    child.process.stdin.close()
        self.pipes.close()


def log_name(child: Child) -> str:
    return f"rank{child.rank}.log"

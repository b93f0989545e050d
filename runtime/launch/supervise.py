"""Start the ranks' processes, watch them, and end all of them as soon as one fails or all fall silent."""

import contextlib
import json
import os
import re
import selectors
import shutil
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
from .rank import Event, resolve_entry

# After a first failure the others have this long to report theirs: the cause is often heard of after its consequence.
GRACE = 1.0
POLL = 0.1
# Importing torch is slow on a busy machine and no sign of a hang.
START = 120.0
# A silent rank is given this long to say where it is.
DUMP = 3.0
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


@dataclass
class Child:
    """One running rank, and what was heard from it."""

    rank: int
    seat: Seat
    process: subprocess.Popen[bytes]
    pipe: IO[bytes]
    log: Path
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
        """(how indirect it is, when, what) if this rank failed."""
        if self.error is not None:
            return (2 if self.error["consequence"] else 0), self.ended or time.monotonic(), self.error["error"]
        if self.ended is None or self.result is not None:
            return None
        code = self.process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        how += " (out of memory?)" if code == -signal.SIGKILL else ""
        return 1, self.ended, f"{how} without a result"


class Supervisor:
    """Runs one entry over seats. Each launch has its own log folder, kept only if the run fails."""

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
        logs = Path(tempfile.mkdtemp(prefix="moeplan-run-"))
        try:
            for rank, seat in enumerate(self.seats):
                self.children.append(self.start(rank, seat, entry, logs))
            self.watch(lambda child: child.ready, max(timeout, START), None)
            with before([child.process.pid for child in self.children]):
                order = {"job": job, "timeout": timeout, "port": self.children[0].port}
                for child in self.children:
                    self.tell(child, order)
                self.watch(lambda child: child.result is not None, timeout, on_event)
            results = [json.loads(child.result or "") for child in self.children]
        finally:
            self.kill()
        shutil.rmtree(logs, ignore_errors=True)
        return results

    def start(self, rank: int, seat: Seat, entry: str, logs: Path) -> Child:
        read, write = os.pipe()
        log = logs / f"rank{rank}.log"
        threads = dict.fromkeys(THREADS, str(seat.threads))
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*seat.prefix, sys.executable, "-P", "-m", "moeplan.runtime.launch.child", str(write)],
                stdin=subprocess.PIPE,
                stdout=output,
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

    def watch(self, done: Callable[[Child], bool], timeout: float, on_event: Callable[[Event], None] | None) -> None:
        """Return when every child is done; raise RunError at the first failure or after ``timeout`` of silence."""
        heard = time.monotonic()
        while not all(done(child) for child in self.children):
            if self.listen(on_event):
                heard = time.monotonic()
            if any(child.failure() for child in self.children):
                self.fail()
            if time.monotonic() - heard > timeout:
                self.fail_silent([child for child in self.children if not done(child)], timeout)

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
        raise RunError(f"{child.name}: {what}; its log: {child.log}") from None

    def fail_silent(self, waiting: list[Child], timeout: float) -> None:
        """Ask the silent ranks where they are; name one that does not merely wait for another."""
        for child in waiting:
            with contextlib.suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGUSR1)
        until = time.monotonic() + DUMP
        stacks: dict[int, list[str]] = {}
        while not all(stacks.get(child.rank) for child in waiting) and time.monotonic() < until:
            time.sleep(POLL)
            stacks = {child.rank: stack(child.log) for child in waiting}
        apart = [child for child in waiting if stacks[child.rank] and "distributed" not in stacks[child.rank][0]]
        child = (apart or waiting)[0]
        where = next((line for line in stacks[child.rank] if "site-packages" not in line), "")
        at = f" (last in {where})" if where else ""
        raise RunError(f"{child.name}: no sign of life for {timeout:g} s{at}; its log: {child.log}")

    def kill(self) -> None:
        """End every child with all that it started; returns when they are gone."""
        for child in self.children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.process.pid, signal.SIGKILL)
        for child in self.children:
            child.process.wait()
            child.pipe.close()
            if child.process.stdin:
                with contextlib.suppress(BrokenPipeError):
                    child.process.stdin.close()
        self.pipes.close()


def stack(log: Path) -> list[str]:
    """Innermost first, "file:line function" of the main thread in the last dump of ``faulthandler``."""
    dump = log.read_text(errors="replace").rpartition("Current thread")[2] or log.read_text(errors="replace")
    frames = re.findall(r'^  File "(.+)", line (\d+) in (\S+)$', dump, flags=re.MULTILINE)
    return [f"{file}:{line} {function}" for file, line, function in frames]

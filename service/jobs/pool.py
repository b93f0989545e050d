"""Where jobs run. A pool starts runs; ``LocalPool`` has a process on this machine for each.

Nothing is handed over but a folder with JSON and paths: no object of one process is rebuilt in another.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO, Any, Protocol

WORDS = 2**20  # characters of a worker's line


@dataclass(frozen=True)
class Work:
    """request: checked; paths: of the documents that it names, by field; folder: for this run alone."""

    request: dict[str, Any]
    paths: Mapping[str, Path]
    folder: Path


@dataclass(frozen=True)
class Outcome:
    """One of three: ``result`` is the path of the answer, ``error`` what is wrong with the question, ``died`` why there
    is neither."""

    result: Path | None = None
    error: str | None = None
    died: str | None = None
    log: str = ""


class Run(Protocol):
    """Of one job."""

    def wait(self, seconds: float) -> list[dict[str, Any]]:
        """What it has told since the last call; returns early where it tells something or ends."""

    @property
    def outcome(self) -> Outcome | None:
        """None while it runs."""

    def stop(self) -> None:
        """Ask for the best found so far."""

    def kill(self) -> None:
        """End it now; returns when it has ended."""


class Pool(Protocol):
    """Starts runs, any number at a time: whoever asks keeps to the number of workers."""

    def start(self, work: Work) -> Run: ...

    def close(self) -> None: ...


class LocalPool:
    """A process of this machine for each run."""

    def start(self, work: Work) -> Run:
        return LocalRun(work)

    def close(self) -> None:
        pass


class LocalRun:
    """A ``worker`` process, and two threads that read what it says."""

    def __init__(self, work: Work) -> None:
        self.folder = work.folder
        paths = {name: str(path) for name, path in work.paths.items()}
        (self.folder / "request.json").write_text(json.dumps({"request": work.request, "paths": paths}))
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C of the terminal is the service's to pass on
        )
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._last: dict[str, Any] = {}
        self._outcome: Outcome | None = None
        Thread(target=self._read, args=(self._process.stdout,), daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, seconds: float) -> list[dict[str, Any]]:
        told: list[dict[str, Any]] = []
        try:
            line = self._lines.get(timeout=seconds)
            while True:
                if line is None:
                    self._end()
                    return told
                if "event" in line:
                    told.append(line["event"])
                else:
                    self._last = line
                line = self._lines.get_nowait()
        except queue.Empty:
            return told

    @property
    def outcome(self) -> Outcome | None:
        return self._outcome

    def stop(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended: ``wait`` says how
            self._process.stdin.write(b"stop\n")
            self._process.stdin.flush()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._end()

    def _read(self, lines: IO[bytes] | None) -> None:
        assert lines is not None
        while text := lines.readline(WORDS):
            try:
                line = json.loads(text)
            except ValueError:
                continue  # the cut last line of a process that was killed
            if isinstance(line, dict):
                self._lines.put(line)
        self._lines.put(None)

    def _end(self) -> None:
        if self._outcome is not None:
            return
        code = self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4000))
        log = self._log.read().decode(errors="replace")
        self._log.close()
        result = self.folder / "result"
        if self._last.get("done") and result.is_file():
            self._outcome = Outcome(result=result, log=log)
        elif "error" in self._last and not self._last.get("unavailable"):
            self._outcome = Outcome(error=str(self._last["error"]), log=log)
        else:
            self._outcome = Outcome(died=str(self._last.get("error", _reason(code))), log=log)


def _reason(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"killed by {name}" + (" (too little memory?)" if name == "SIGKILL" else "")

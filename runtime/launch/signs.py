"""Signs of life of a rank: what its process does, and where its Python code is."""

import contextlib
import linecache
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

POLL = 0.1
# A silent rank is given this long to say where it is.
DUMP = 3.0
STOPPED = "Tt"
"""States of /proc: stopped by a signal, or by a debugger."""
BUSY = "RD"
"""Computing, or ready to; waiting for a disk."""
OWN = f"{Path(__file__).parents[2]}{os.sep}"
# What a rank calls when it waits for others: torch.distributed, or the handle of a collective under way.
MEETING = re.compile(r"\bdist\.|\.wait\(\)|barrier\(|\ball_(gather|reduce|to_all)")


class Frame(NamedTuple):
    """A line of Python code."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}"

    @property
    def meets(self) -> bool:
        """Whether this line waits for other ranks."""
        return "/distributed/" in self.file or bool(MEETING.search(linecache.getline(self.file, self.line)))


def process_state(pid: int) -> tuple[str, int]:
    """State letter and processor time in ticks, as /proc/PID/stat says; ("X", 0) when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    return fields[0], int(fields[11]) + int(fields[12])


class Starting:
    """When each process of a start was last seen to do something: it takes seconds, and nobody reports meanwhile."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.ticks = dict.fromkeys(pids, -1)
        self.seen = dict.fromkeys(pids, time.monotonic())

    def silence(self, pid: int) -> float:
        """Seconds since it last used processor time, was ready to, or waited for a disk."""
        state, ticks = process_state(pid)
        if state in BUSY or ticks > self.ticks[pid]:
            self.seen[pid] = time.monotonic()
        self.ticks[pid] = ticks
        return time.monotonic() - self.seen[pid]


def read_log(log: IO[bytes]) -> str:
    """All of a rank's log, which the rank goes on writing: its place in the file is left alone."""
    return os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")


def ask(pids: Sequence[int], logs: Sequence[IO[bytes]]) -> list[list[Frame]]:
    """Where the main thread of each process is, innermost first; empty for one that does not answer in ``DUMP`` s."""
    before = [os.fstat(log.fileno()).st_size for log in logs]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
    until = time.monotonic() + DUMP
    while True:
        stacks = [frames(read_log(log)[start:]) for log, start in zip(logs, before, strict=True)]
        if all(stacks) or time.monotonic() > until:
            return stacks
        time.sleep(POLL)


def frames(dump: str) -> list[Frame]:
    """Those of the main thread in the last dump of ``faulthandler``, innermost first."""
    last = dump.rpartition("Current thread")[2] or dump
    found = re.findall(r'^  File "(.+)", line (\d+) in (\S+)$', last, flags=re.MULTILINE)
    return [Frame(file, int(line), function) for file, line, function in found]


def own_frame(stack: Sequence[Frame]) -> Frame | None:
    """The innermost frame in moeplan."""
    return next((frame for frame in stack if frame.file.startswith(OWN)), None)

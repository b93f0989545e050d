"""Finding the processes that a launcher started, and seeing that none is left."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any


def processes() -> Iterator[tuple[int, int, int, str]]:
    """(id, parent, session, command) of every process that has not ended."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as stat, open(f"/proc/{entry}/cmdline") as line:
                fields, command = stat.read().rpartition(")")[2].split(), line.read()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] not in "ZX":
            yield int(entry), int(fields[1]), int(fields[3]), command


def ranks_of(parent: int) -> list[int]:
    """Ids of the rank processes of one launcher, in rank order: they are started one after the other."""
    return sorted(pid for pid, ppid, _, command in processes() if ppid == parent and "moeplan.runtime.child" in command)


def left(found: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What ``found`` still finds when it finds nothing, or after ``seconds``."""
    until = time.monotonic() + seconds
    while (still := found()) and time.monotonic() < until:
        time.sleep(0.05)
    return still

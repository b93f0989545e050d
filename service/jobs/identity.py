"""Which process a service is, so that another on the same machine knows at once that it has ended.

A process is named by the machine's boot, its PID namespace, its number and when it started: no other ever has that
name.
"""

import os
from contextlib import suppress
from pathlib import Path


def here() -> str:
    """The name of this process; empty where the system does not tell."""
    with suppress(OSError, IndexError, ValueError):
        return f"{_machine()} {os.getpid()} {_started(os.getpid())}"
    return ""


def gone(name: str) -> bool:
    """Whether a process of this machine has surely ended; False where it lives, or cannot be seen from here."""
    with suppress(OSError, IndexError, ValueError):
        machine, number, started = name.rsplit(" ", 2)
        if machine != _machine():
            return False
        try:
            return _started(int(number)) != started
        except FileNotFoundError:
            return True
    return False


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _started(number: int) -> str:
    """Clock ticks from the boot to its start; of one that has ended and waits for its parent, an empty text."""
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]

"""Removes what a lab has set up: when it is left, through a watchdog process if its owner is killed, or at the next
lab's start. Run by path as that watchdog, with the standard library alone, so that it is there within milliseconds.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE = 10.0


def namespaces(prefix: str) -> list[str]:
    """Names of the network namespaces that begin so."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for line in listed if (name := line.split()[0]).startswith(prefix)]


def groups(prefix: str, root: Path) -> list[Path]:
    """The cgroups below ``root`` whose names begin so."""
    return sorted(path for path in root.glob(f"{prefix}*") if path.is_dir())


def processes(names: list[str], folders: list[Path]) -> list[int]:
    """Ids of all processes in these namespaces and cgroups."""
    pids: list[str] = []
    for name in names:
        # Fails only if another cleaner was faster.
        pids += subprocess.run(
            ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
        ).stdout.split()
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            pids += (folder / "cgroup.procs").read_text().split()
    return [int(pid) for pid in pids]


def clean(prefix: str, root: Path) -> None:
    """End all processes of a lab, then remove its namespaces and cgroups. Repeating it does no harm."""
    names, folders = namespaces(prefix), groups(prefix, root)
    until = time.monotonic() + PATIENCE
    while (alive := processes(names, folders)) and time.monotonic() < until:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    for folder in folders:
        remove(folder, until)


def remove(group: Path, until: float) -> None:
    """Remove a cgroup; the kernel may need a moment to see that its last process has ended."""
    while True:
        try:
            return group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)


def clean_stale(root: Path) -> None:
    """Clean up after labs whose process is gone (and whose watchdog was killed too)."""
    names = namespaces("moeplan-") + [folder.name for folder in groups("moeplan-", root)]
    for owner in {match[1] for name in names if (match := re.match(r"moeplan-(\d+)-", name))}:
        if not os.path.exists(f"/proc/{owner}"):
            clean(f"moeplan-{owner}-", root)


@contextlib.contextmanager
def guarded(prefix: str, root: Path) -> Iterator[None]:
    """Clean up when this context is left, or from another process when this one dies inside it."""
    argv = [sys.executable, "-I", "-S", __file__, prefix, str(root)]
    watchdog = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        clean(prefix, root)
        watchdog.communicate(b"done")


if __name__ == "__main__":
    if sys.stdin.buffer.read() != b"done":  # the pipe's end alone: its owner died
        clean(sys.argv[1], Path(sys.argv[2]))

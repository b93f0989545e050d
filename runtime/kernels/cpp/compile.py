"""Runs compilers so that nothing outlives the process that asked: neither they nor their folder, however it ends.

The asker starts this file by path, with the standard library alone, in a session of its own: commands arrive as one
line of JSON on stdin, their outcome leaves on stdout. When stdin ends before that, the asker has died: the folder is
removed and the session killed, this process included. If this process is the one that was killed, the asker does it;
if both were, the next build does (``remove_stale``), for it finds the folder without the lock that both hold.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import mkdtemp

PREFIX = "building-"


@contextlib.contextmanager
def workshop(root: Path) -> Iterator[tuple[Path, int]]:
    """A new folder below ``root`` and the descriptor that holds its lock; removed at the end."""
    folder = Path(mkdtemp(dir=root, prefix=PREFIX))
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder, lock
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_stale(root: Path) -> None:
    """Remove the folders of builds that were killed: those that nobody holds locked."""
    for folder in root.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its build is under way
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def compile_in(folder: Path, lock: int, stages: Sequence[Sequence[Sequence[str]]]) -> list[tuple[list[str], int, str]]:
    """Run the stages one after the other, the commands of each side by side.

    Returns (command, exit status, standard error) of those that ran: all of them, or those up to the first stage with
    a failure. Raises ChildProcessError when the process that ran them was killed.
    """
    argv = [sys.executable, "-I", "-S", __file__, str(folder)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(lock,), start_new_session=True
    ) as guard:
        assert guard.stdin is not None
        assert guard.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                guard.stdin.write(json.dumps(stages).encode() + b"\n")
                guard.stdin.flush()
            answer = guard.stdout.read()  # stdin stays open: its end would say that we died
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(guard.pid, signal.SIGKILL)
    if not answer:
        raise ChildProcessError("the process that ran the compiler was killed")
    return [(command, status, complaint) for command, status, complaint in json.loads(answer)]


def run(command: list[str]) -> tuple[list[str], int, str]:
    done = subprocess.run(
        command, capture_output=True, stdin=subprocess.DEVNULL, text=True, errors="replace", check=False
    )
    status = done.returncode
    killed = f"error: it was killed by {signal.Signals(-status).name} (out of memory?)" if status < 0 else ""
    return command, status, done.stderr or killed


def end_with_asker(folder: str) -> None:
    """Wait for the end of stdin, then leave nothing."""
    while os.read(0, 1):  # no Python object of stdin: its lock would be held when the interpreter ends
        continue
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def main(folder: str) -> None:
    os.environ["TMPDIR"] = folder  # the compilers' own files end with it
    stages = json.loads(sys.stdin.buffer.readline() or b"[]")
    threading.Thread(target=end_with_asker, args=[folder], daemon=True).start()
    outcome: list[tuple[list[str], int, str]] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for stage in stages:
            outcome += pool.map(run, stage)
            if any(status for _, status, _ in outcome):
                break
    sys.stdout.write(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1])

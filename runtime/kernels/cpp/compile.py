"""Runs compilers so that nothing outlives the process that asked: neither they nor their folder, however it ends.

The asker starts this file by path, with the standard library alone, in a session of its own: what to run arrives as
one line of JSON on stdin, the outcome leaves on stdout. This process makes the folder, so that there is none without
it. When stdin ends early, the asker has died: the folder is removed and the session killed, this process included.
If this process is the one that was killed, the asker removes it; if both were, the next build does
(``remove_stale``), for it finds the folder without the lock that this process holds.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PREFIX = "building-"
PATIENCE = 5.0
Outcome = list[tuple[list[str], int, str]]
ending = threading.Event()


def new_folder(root: Path) -> Path:
    """A name below ``root`` that nobody has."""
    return root / f"{PREFIX}{secrets.token_hex(8)}"


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


def compile_in(folder: Path, stages: Sequence[Sequence[Sequence[str]]], product: Path, target: Path) -> Outcome:
    """Run the stages one after the other, the commands of each side by side; then rename product's folder to target.

    ``folder`` is made for the time. Returns (command, exit status, standard error) of those that ran: all of them, or
    those up to the first stage with a failure. Raises ChildProcessError when the process that ran them was killed.
    """
    argv = [sys.executable, "-I", "-S", __file__]
    guard = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    with guard:
        assert guard.stdin is not None
        assert guard.stdout is not None
        order = {"folder": str(folder), "stages": stages, "product": str(product), "target": str(target)}
        try:
            with contextlib.suppress(BrokenPipeError):
                guard.stdin.write(json.dumps(order).encode() + b"\n")
                guard.stdin.flush()
            answer = guard.stdout.read()  # stdin stays open: its end would say that we died
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(guard.pid, signal.SIGKILL)
            remove(folder)
    if not answer:
        raise ChildProcessError("the process that ran the compiler was killed")
    return [(command, status, complaint) for command, status, complaint in json.loads(answer)]


def remove(folder: Path) -> None:
    """Remove a folder in which processes that are being killed may still write a moment longer."""
    until = time.monotonic() + PATIENCE
    while folder.exists() and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)


def run(command: list[str]) -> tuple[list[str], int, str]:
    if ending.is_set():
        return command, 1, ""
    done = subprocess.run(
        command, capture_output=True, stdin=subprocess.DEVNULL, text=True, errors="replace", check=False
    )
    status = done.returncode
    killed = f"error: it was killed by {signal.Signals(-status).name} (out of memory?)" if status < 0 else ""
    return command, status, done.stderr or killed


def end_with_asker(folder: Path) -> None:
    """Wait for the end of stdin, then leave nothing."""
    while os.read(0, 1):  # no Python object of stdin: its lock would be held when the interpreter ends
        continue
    ending.set()
    os.killpg(0, signal.SIGUSR1)  # ends the compilers alone: this process has a handler for it
    remove(folder)
    os.killpg(0, signal.SIGKILL)


def make(folder: str) -> None:
    """Make the folder and hold its lock until this process ends."""
    while True:
        os.mkdir(folder, 0o700)
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(folder):  # else another build took it for a stale one just before it was locked
            return
        os.close(lock)


def main() -> None:
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        return  # the asker died while it wrote
    order = json.loads(line)
    folder = order["folder"]
    make(folder)
    os.umask(0o077)  # whatever the user's: nobody else may write what will be loaded
    os.environ["TMPDIR"] = folder  # the compilers' own files end with it
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    threading.Thread(target=end_with_asker, args=[Path(folder)], daemon=True).start()
    Path(order["product"]).mkdir()
    outcome: Outcome = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for stage in order["stages"]:
            outcome += pool.map(run, stage)
            if any(status for _, status, _ in outcome):
                break
        else:
            os.rename(order["product"], order["target"])
    remove(Path(folder))
    if ending.is_set():
        signal.pause()  # the other thread ends this process
    sys.stdout.write(json.dumps(outcome))


if __name__ == "__main__":
    main()

"""Standard streams and Ctrl-C as a shell hands them over: one line, an exit code, and the work is not lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MOEPLAN = [sys.executable, "-m", "moeplan"]
FULL = "error: standard output: cannot be written (No space left on device)\n"
CLOSED = "error: standard output: cannot be written (Bad file descriptor)\n"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash with ``moeplan`` in it."""
    argv = ["bash", "-c", line.replace("moeplan", f"{sys.executable} -m moeplan", 1)]
    return subprocess.run(argv, capture_output=True, text=True, errors="replace", env=os.environ | environment)


@pytest.mark.parametrize(
    ("line", "code", "err"),
    [
        ("moeplan models > /dev/full", 2, FULL),
        ("moeplan --help > /dev/full", 2, FULL),
        ("moeplan models >&-", 2, CLOSED),
        ("moeplan models --json | true; exit ${PIPESTATUS[0]}", 141, ""),
        ("moeplan explain missing.json 2> /dev/full", 2, ""),
        ("moeplan explain missing.json 2>&- >&-", 2, ""),
    ],
)
def test_streams_that_fail(line: str, code: int, err: str) -> None:
    done = shell(line)
    assert (done.returncode, done.stderr) == (code, err)


def test_any_encoding_and_width_prints() -> None:
    for environment in ({"PYTHONIOENCODING": "latin-1"}, {"COLUMNS": "0"}, {"COLUMNS": "²", "TERMINAL_WIDTH": "x"}):
        done = shell("moeplan models", **environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert "mixtral" in done.stdout


@pytest.mark.parametrize("delay", [0.1, 0.4, 1.0])
def test_ctrl_c_while_importing_is_one_line(delay: float, tmp_path: Path) -> None:
    """From the moment that the program is ours, however far the imports are."""
    mark = tmp_path / "started"
    program = f"import moeplan.service.cli as c, pathlib; pathlib.Path({str(mark)!r}).touch(); c.main()"
    process = subprocess.Popen([sys.executable, "-c", program, "models"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    while not mark.exists():
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) in {(130, "error: interrupted\n"), (0, "")}  # 0: it was done before

"""Sixty kills at random moments, of ranks, of runs and of builds: the right one is named, and nothing is left."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moeplan.runtime.kernels.cpp.build import build
from moeplan.runtime.launch.local import LocalLauncher
from moeplan.spec.errors import MoeplanError, RunError
from moeplan.tests.killing import left, processes, ranks_of

HERE = "moeplan.tests.test_kills"
KILLS = 20


def meet(rank, job):
    """Ranks meet again and again, for a minute at most: rank 1 waits in the collective for rank 0, and nobody spins."""
    until, go = time.monotonic() + 60, torch.ones(1)
    while go.item():
        if rank.rank == 0:
            time.sleep(0.002)
        go = torch.tensor([float(time.monotonic() < until)])
        dist.all_reduce(go, op=dist.ReduceOp.MIN)
    return {}


def kill_a_rank(draw, killed):
    """Wait for both ranks' processes, then a random while, and kill one."""
    until = time.monotonic() + 60
    while len(pids := ranks_of(os.getpid())) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, 5))
    who, number = draw.randrange(2), draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
    os.kill(pids[who], number)
    killed.append((who, number.name, pids))


@pytest.mark.timeout(600)
def test_killed_ranks_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    draw = random.Random(1)
    for _ in range(KILLS):
        killed: list = []
        killer = threading.Thread(target=kill_a_rank, args=[draw, killed])
        killer.start()
        with pytest.raises(RunError) as raised:
            LocalLauncher(2).run(f"{HERE}:meet", {}, timeout=100)
        killer.join()
        who, name, pids = killed[0]
        assert str(raised.value).startswith(f"rank {who} (host "), (killed, raised.value)
        assert f"was killed by {name}" in str(raised.value)
        assert not left(lambda pids=pids: [p for p, *_ in processes() if p in pids])
    # Only the folders of logs that the messages name.
    assert all(path.name.startswith("moeplan-run-") for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == KILLS


RUN = f"""
from moeplan.runtime.launch.local import LocalLauncher
LocalLauncher(2).run("{HERE}:meet", {{}}, timeout=100)
"""


@pytest.mark.timeout(600)
def test_killed_runs_leave_nothing(tmp_path):
    draw = random.Random(2)
    for _ in range(KILLS):
        parent = subprocess.Popen(
            [sys.executable, "-c", RUN], stderr=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(tmp_path)}
        )
        time.sleep(draw.uniform(0, 7))
        pids = ranks_of(parent.pid)
        number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        parent.send_signal(number)
        assert parent.wait(timeout=60) != 0
        assert not left(lambda pids=pids: [p for p, *_ in processes() if p in pids]), number
        assert list(tmp_path.iterdir()) == [], number


COMPILER = """#!/bin/sh
case "$*" in
  *-dM*) echo '#define __GNUC__ 12'; exit 0 ;;
  *--version*) echo 'g++ of a test'; exit 0 ;;
esac
while [ "$1" != -o ]; do shift; done
cp /dev/null "$TMPDIR/a-file-of-the-compiler"
sleep 0.2
cp /dev/null "$2"
"""


def start_build():
    """``build`` in a process of its own, forked: torch is imported already."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            build()
        except (MoeplanError, KeyboardInterrupt):
            os._exit(2)
        finally:
            os._exit(0)
    return pid


def family(pid):
    """A process and all that it started, found by their parents."""
    found, everyone = [pid], list(processes())
    for parent in found:
        found += [p for p, ppid, *_ in everyone if ppid == parent]
    return found


@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="kernels are built on x86-64")
def test_killed_builds_leave_nothing(tmp_path, monkeypatch):
    """The asker, the process that runs the compilers, a compiler or the whole session is killed."""
    script, cache = tmp_path / "g++", tmp_path / "cache" / "moeplan" / "kernels"
    script.write_text(COMPILER)
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    draw, hit = random.Random(3), 0
    for _ in range(KILLS):
        pid = start_build()
        time.sleep(draw.uniform(0, 0.8))
        victims = family(pid)
        victim = draw.choice(victims)
        hit += victim != pid
        with contextlib.suppress(ProcessLookupError):  # a compiler that ended just now
            os.kill(victim, draw.choice([signal.SIGKILL, signal.SIGTERM]))
        os.waitpid(pid, 0)
        assert not left(lambda victims=victims: [p for p, *_ in processes() if p in victims])
        assert not left(lambda: list(cache.glob("building-*")))
        for built in cache.glob("*/*.so"):
            built.unlink()
            built.parent.rmdir()
    assert hit > 0


def test_a_build_whose_every_process_was_killed_is_cleared_by_the_next(tmp_path, monkeypatch):
    script, cache = tmp_path / "g++", Path(tmp_path / "cache" / "moeplan" / "kernels")
    script.write_text(COMPILER)
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pid = start_build()
    until = time.monotonic() + 30
    while not list(cache.glob("building-*/*")) and time.monotonic() < until:
        time.sleep(0.01)
    for victim in family(pid):
        os.kill(victim, signal.SIGSTOP)
    for victim in family(pid):
        os.kill(victim, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert list(cache.glob("building-*"))
    assert build().is_file()
    assert not list(cache.glob("building-*"))

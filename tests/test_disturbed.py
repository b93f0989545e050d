"""Other programs on the processors of a profile or of a run, real ones: they are counted, and said in one line."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from moeplan.planner.search import solve
from moeplan.profiler import profile
from moeplan.runtime.launch import LocalLauncher
from moeplan.runtime.run import run
from moeplan.spec import Workload
from moeplan.spec.load import Load
from moeplan.tests.test_profiler import tiny

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]
SAID = "other programs used "
STEPS = Workload.from_text("prefill:512@64")
LOOP = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint('on', flush=True)\nwhile True: pass"
QUIET, APART = 0.03, 0.06  # of the cores: others', and what ticks and the kernel make of it


@contextlib.contextmanager
def loops() -> Iterator[None]:
    """A busy loop on every core."""
    found = [
        subprocess.Popen([sys.executable, "-S", "-c", LOOP, str(core)], stdout=subprocess.PIPE, start_new_session=True)
        for core in sorted(os.sched_getaffinity(0))
    ]
    try:
        for loop in found:
            assert loop.stdout is not None
            loop.stdout.readline()
        yield
    finally:
        for loop in found:
            loop.kill()
            loop.wait()
            assert loop.stdout is not None
            loop.stdout.close()


class Everyone:
    """What this machine's processors did, less what this process and its children that have ended used of them: read by
    other means than ``LoadMeter``, which knows the ranks by their commands."""

    def __init__(self) -> None:
        self.begin = self._read()

    def _read(self) -> tuple[float, float]:
        with open("/proc/stat") as file:
            user, nice, system, *_ = map(int, file.readline().split()[1:])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4]), time.monotonic()

    def foreign(self) -> float:
        """Part of all cores."""
        used, now = self._read()
        return (used - self.begin[0]) / (now - self.begin[1]) / (os.cpu_count() or 1)


def measured_plan(launcher: LocalLauncher):
    return profile(launcher, [tiny()], budget_seconds=6.0, accept_noise=True, workloads=[STEPS])


def one_line(notes, load: Load) -> None:
    (line,) = [known for known in notes if known.startswith(SAID)]
    assert f"{SAID}{load.foreign:.0%} of the cores" in line


def test_busy_loops_are_said_of_the_profile_its_plans_and_the_run():
    launcher = LocalLauncher(2)
    with loops():
        cluster = measured_plan(launcher)
        plan = solve(tiny(), cluster, STEPS)
        report = run(plan, launcher, tolerance=1e9, repetitions=200, check_budget=1)
    load = cluster.provenance.load
    assert load is not None
    assert load.foreign is not None
    assert load.foreign > 0.2
    one_line(cluster.provenance.warnings, load)
    one_line(plan.notes, load)
    assert report.machine is not None
    assert report.machine.load.foreign > 0.2
    one_line(report.notes, report.machine.load)


def test_what_ranks_do_themselves_is_not_said():
    """Others may be there, too: they have had no less than the profile says of them, and where nobody was there no line
    says so."""
    everyone, begin = Everyone(), time.monotonic()
    cluster = measured_plan(LocalLauncher(2))
    others, seconds = everyone.foreign(), time.monotonic() - begin
    load = cluster.provenance.load
    assert load is not None
    assert load.foreign is not None
    assert load.foreign * load.seconds < others * seconds + APART * load.seconds
    said = [known for known in cluster.provenance.warnings if known.startswith(SAID)]
    assert bool(said) == load.disturbed
    if others > QUIET:
        pytest.skip(f"other programs used {others:.0%} of the cores: whether nothing is said of none is not known")
    assert not said
    assert not any(SAID in known for known in solve(tiny(), cluster, STEPS).notes)

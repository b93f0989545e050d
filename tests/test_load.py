"""Foreign load: recorded files of the kernel, and one real program that takes a processor."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.runtime.load import (
    TICKS,
    Cores,
    LoadMeter,
    Program,
    Reading,
    cgroup_folders,
    core_seconds,
    family,
    group_seconds,
    load_between,
    moved,
    named,
    pressure_seconds,
    process_seconds,
    quota_cores,
    throttled_seconds,
)
from moeplan.spec.load import COARSE, NOTABLE, Load, note, worst

STAT = """cpu  36999 1048 5895 80220 824 0 219 513 0 0
cpu0 8138 409 1853 51784 250 0 88 275 0 0
cpu1 28861 639 4042 28436 573 7 131 237 0 0
intr 325035 0 0
"""
PRESSURE = """some avg10=19.11 avg60=5.87 avg300=1.86 total=11542640
full avg10=0.00 avg60=0.00 avg300=0.00 total=0
"""


def test_processor_time_of_cores_is_that_of_programs_and_what_was_stolen():
    assert core_seconds(STAT, [1]) == Cores((28861 + 639 + 4042) / TICKS, 237 / TICKS)
    assert core_seconds(STAT, [0, 1]) == Cores((36999 + 1048 + 5895) / TICKS, 512 / TICKS)
    assert core_seconds(STAT, [0, 2]) is None
    assert core_seconds("", [0]) is None
    assert core_seconds("cpu0 0 0 0 0 0 0 0 0\n", [0]) is None  # a container whose /proc/stat stands still
    assert core_seconds("cpu0 1 2 3 4\n", [0]) == Cores(6 / TICKS, 0.0)  # before Linux 2.6.11 nothing was stolen


def test_a_process_is_read_whatever_its_name():
    line = "17 (a b) (c) S 1 17 17 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 99 1 1"
    assert process_seconds(line) == 300 / TICKS
    assert process_seconds("") == 0.0


def test_pressure_and_throttling_in_both_forms_of_cgroups():
    assert pressure_seconds(PRESSURE) == pytest.approx(11.54264)
    assert pressure_seconds("") is None
    assert throttled_seconds("nr_periods 5\nnr_throttled 2\nthrottled_time 3000000000\n") == 3.0
    assert throttled_seconds("usage_usec 1\nthrottled_usec 250000\n") == 0.25
    assert throttled_seconds("usage_usec 1\n") is None


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.cfs_quota_us": "50000\n", "cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_quotas(tmp_path: Path, files: dict[str, str], cores: float | None):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert quota_cores(tmp_path) == cores


@pytest.mark.parametrize("text", ["0::/a/b\n", "4:cpu,cpuacct:/a/b\n3:memory:/x\n"])
def test_the_groups_of_a_process_reach_up_to_the_root(tmp_path: Path, text: str):
    top = tmp_path if text.startswith("0") else tmp_path / "cpu,cpuacct"
    (top / "a" / "b").mkdir(parents=True)
    assert list(cgroup_folders(text, tmp_path)) == [top / "a" / "b", top / "a", top]


def reading(at: float, **changed) -> Reading:
    return Reading(
        **{"at": at, "cores": None, "own": 0.0, "inside": None, "pressure": None, "throttled": None} | changed
    )


def test_foreign_is_what_all_had_less_what_we_had():
    before = reading(10.0, cores=Cores(100.0, 5.0), own=50.0, pressure=1.0)
    after = reading(12.0, cores=Cores(103.0, 5.4), own=51.0, pressure=1.5)
    load = load_between(before, after, 2, ("cgroup cpu.stat",))
    assert load.foreign == pytest.approx(0.5)  # 2 of 4 processor seconds
    assert load.steal == pytest.approx(0.1)
    assert load.taken == pytest.approx(0.6)
    assert load.pressure == pytest.approx(0.25)
    assert load.throttled is None
    assert load.missing == ("cgroup cpu.stat",)


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 10), st.integers(1, 64))
def test_parts_stay_within_0_and_1_whatever_ticks_do(busy, own, seconds, cores):
    load = load_between(
        reading(1.0, cores=Cores(1.0, 1.0)), reading(1.0 + seconds, cores=Cores(1 + busy, 1.0), own=own), cores, ()
    )
    assert 0 <= load.foreign <= 1
    assert load.steal == 0


def test_what_a_system_lacks_is_named_and_counts_as_nothing(tmp_path: Path):
    meter = LoadMeter(proc=tmp_path, cgroups=tmp_path)
    assert meter.missing == ("/proc/stat", "cpu pressure", "cgroup cpu.stat")
    load = meter.since(meter.begin)
    assert (load.foreign, load.steal, load.pressure, load.throttled) == (None, None, None, None)
    assert load.taken == 0.0
    assert meter.quota() is None
    assert meter.programs(0.0) == []


def test_without_the_cores_time_that_of_the_container_counts(tmp_path: Path):
    (tmp_path / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    assert group_seconds(tmp_path) == 2.5
    (tmp_path / "cpuacct.usage").write_text("8000000000\n")
    assert group_seconds(tmp_path) == 8.0
    assert group_seconds(tmp_path / "none") is None
    before, after = reading(1.0, own=5.0, inside=3.0), reading(3.0, own=6.0, inside=5.0)
    assert load_between(before, after, 2, ()).foreign == pytest.approx(0.5)  # 2 of 4 processor seconds
    assert load_between(before, after, 2, ()).steal is None


def test_a_container_s_others_are_all_of_it_but_ours_on_our_part_of_the_cores(tmp_path: Path):
    """Its /proc/stat stands still; a rank on one core."""
    (tmp_path / "stat").write_text("cpu0 0 0 0 0\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/\n")
    groups = tmp_path / "groups"
    groups.mkdir()
    meter = LoadMeter(proc=tmp_path, cgroups=groups)
    assert meter.read().inside is None
    (groups / "cpu.stat").write_text("usage_usec 30000000\n")
    own = os.getpid()
    (tmp_path / str(own)).mkdir()
    (tmp_path / str(own) / "stat").write_text(f"{own} (x) S {'0 ' * 10}{10 * TICKS} 0 0\n")
    inside = meter.read().inside
    assert inside == pytest.approx(20 * len(meter.cores) / (os.cpu_count() or 1))
    assert "/proc/stat" in meter.missing


def test_what_is_left_out_does_not_count():
    """Ten seconds, of which six of waiting for another program that had all of a core then."""
    begin, wait = reading(0.0, cores=Cores(0, 0)), reading(2.0, cores=Cores(3, 0), own=3.0)
    go = reading(8.0, cores=Cores(9, 0.5), own=3.0, pressure=1.0)
    end = reading(10.0, cores=Cores(12.0, 0.5), own=6.0)
    assert load_between(begin, end, 2, ()).foreign == pytest.approx(0.3)
    rest = moved(begin, [(wait, go)])
    assert (rest.at, rest.cores, rest.own, rest.pressure) == (6.0, Cores(6, 0.5), 0.0, None)
    load = load_between(rest, end, 2, ())
    assert (load.seconds, load.foreign, load.steal) == (4.0, 0.0, 0.0)
    assert moved(begin, []) == begin


@pytest.mark.parametrize("seconds", [0.02, 1.0, 60.0])
def test_a_few_percent_and_what_ticks_may_feign_are_worth_no_note(seconds):
    limit = NOTABLE + COARSE / max(seconds, COARSE)
    assert not Load(seconds=seconds, foreign=limit - 1e-6).disturbed
    assert Load(seconds=seconds, foreign=limit + 1e-6).disturbed
    assert not Load(seconds=seconds).disturbed  # unknown


def test_a_note_says_who_when_and_what_to_do():
    assert note(Load(seconds=60, foreign=0.38, steal=0.001), "while this was measured", "profile") == (
        "other programs used 38% of the cores while this was measured; profile again on an idle machine",
    )
    assert note(Load(seconds=60, foreign=0.0, steal=0.2), "then", "run") == (
        "other virtual machines used 20% of the cores then; run again on an idle machine",
    )
    assert note(Load(seconds=60, foreign=0.03), "then", "run") == note(None, "then", "run") == ()


def test_of_several_ranks_the_worst_counts():
    loads = [Load(seconds=1, foreign=0.2, missing=("a",)), Load(seconds=2, foreign=0.1, steal=0.3, missing=("a", "b"))]
    assert worst(loads) == Load(seconds=2, foreign=0.2, steal=0.3, missing=("a", "b"))


def process(folder: Path, pid: int, parent: int, command: str) -> None:
    (folder / str(pid)).mkdir()
    (folder / str(pid) / "stat").write_text(f"{pid} (x y) S {parent} {'0 ' * 20}\n")
    (folder / str(pid) / "cmdline").write_text(command.replace(" ", "\0"))


def test_peers_and_competitors_are_ours_and_other_children_are_not(tmp_path: Path):
    process(tmp_path, 10, 1, "moeplan profile")
    process(tmp_path, 11, 10, "python -P -m moeplan.runtime.launch.child 3")
    process(tmp_path, 12, 10, "python -P -m moeplan.runtime.launch.child 4")
    process(tmp_path, 13, 10, "python /x/runtime/launch/lab_competitor.py spin")
    process(tmp_path, 14, 10, "python training.py")
    process(tmp_path, 15, 1, "moeplan profile")
    assert sorted(family(tmp_path, 11, 10)) == [10, 11, 12, 13]
    assert family(tmp_path, 11, 1) == [11]


def test_the_busiest_programs_are_named():
    text = named(
        [Program(7, "cc1plus", 0.97), Program(8, "python3", 0.4), Program(9, "ld", 0.3), Program(1, "a", 0.01)]
    )
    assert text == "cc1plus (process 7, 97% of a core), python3 (process 8, 40% of a core)"
    assert "cannot be seen" in named([Program(1, "a", 0.01)])


def test_a_real_program_on_our_core_is_seen_and_named():
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everywhere)})
    script = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint('on', flush=True)\nwhile True: pass"
    loop = subprocess.Popen(
        [sys.executable, "-S", "-c", script, str(min(everywhere))], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert loop.stdout is not None
        loop.stdout.readline()
        meter = LoadMeter()
        assert loop.pid not in meter.own
        before = meter.read()
        time.sleep(1.0)
        load = meter.since(before)
        assert load.foreign is not None
        assert load.foreign > 0.5
        before, end = meter.read(), time.process_time() + 0.3
        while time.process_time() < end:
            pass
        load = meter.since(before)
        assert load.foreign is not None
        assert 0.1 < load.foreign < 0.95  # our own work is not foreign
        programs = meter.programs(0.5)
        assert loop.pid in [program.pid for program in programs]
    finally:
        os.killpg(loop.pid, signal.SIGKILL)
        loop.wait()
        os.sched_setaffinity(0, everywhere)

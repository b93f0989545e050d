"""Foreign load: what other programs, other virtual machines and quotas take of the processors that ranks run on.

Three sources of Linux, each by itself optional: /proc/stat (processor time of everyone, by core, and what the
hypervisor stole) minus what the ranks' own processes used; pressure (the cgroup's cpu.pressure, or /proc/pressure/cpu);
a quota's throttling (cpu.stat of the cgroup, version 1 or 2). Time in interrupts is left out: on the ranks' cores it is
mostly their own messages'. The kernel counts /proc/stat in ticks: a window should span at least ten of them.

A container may have no /proc/stat, or one that stands still. What its outermost visible cgroup used takes its place
then: others in the container are seen, taken to be on all cores alike; those beside it are not.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from ..spec.load import Load

TICKS = os.sysconf("SC_CLK_TCK")
OWN_NAMES = ("moeplan", "lab_competitor.py")  # in the command lines of our processes
MOST_NAMED = 2  # programs named as those that load the machine


class Cores(NamedTuple):
    """Seconds of some cores since boot."""

    busy: float
    steal: float


class Program(NamedTuple):
    """A program and the part of one core that it had."""

    pid: int
    name: str
    share: float


@dataclass(frozen=True)
class Reading:
    """Everything at one moment; None where this system does not tell."""

    at: float
    cores: Cores | None
    own: float
    inside: float | None  # others in the same container, on our cores
    pressure: float | None
    throttled: float | None


class LoadMeter:
    """Reads the load of the cores that this process may use; ``since`` compares with an earlier ``read``.

    Its own are this process, its parent (the launcher), its peers on this host and a lab's competitors, as they are
    when the meter is made. ``proc`` and ``cgroups`` are the folders to read.
    """

    def __init__(self, proc: str | Path = "/proc", cgroups: str | Path = "/sys/fs/cgroup") -> None:
        self.proc, self.cores = Path(proc), sorted(os.sched_getaffinity(0))
        self.own = family(self.proc, os.getpid(), os.getppid())
        self._shares = {pid: self._share(pid) for pid in self.own}
        self._groups = list(dict.fromkeys(cgroup_folders(_text(self.proc / "self/cgroup"), Path(cgroups))))
        self._left_out: list[tuple[Reading, Reading]] = []
        self.begin = self.read()
        now = self.begin
        sources = {"/proc/stat": now.cores, "cpu pressure": now.pressure, "cgroup cpu.stat": now.throttled}
        self.missing = tuple(name for name, value in sources.items() if value is None)

    def _share(self, pid: int) -> float:
        """The part of a process's time that is spent on our cores: all of a rank's, half of an unbound launcher's."""
        with suppress(OSError):
            allowed = os.sched_getaffinity(pid)
            return len(allowed.intersection(self.cores)) / len(allowed)
        return 0.0

    def read(self) -> Reading:
        used = {pid: process_seconds(_text(self.proc / f"{pid}/stat")) for pid in self._shares}
        own = sum(share * used[pid] for pid, share in self._shares.items())
        group = first(group_seconds(folder) for folder in reversed(self._groups))
        ours = len(self.cores) / (os.cpu_count() or 1)
        pressures = [folder / "cpu.pressure" for folder in self._groups] + [self.proc / "pressure/cpu"]
        return Reading(
            at=time.monotonic(),
            cores=core_seconds(_text(self.proc / "stat"), self.cores),
            own=own,
            inside=None if group is None else ours * (group - sum(used.values())),
            pressure=first(pressure_seconds(_text(path)) for path in pressures),
            throttled=first(throttled_seconds(_text(folder / "cpu.stat")) for folder in self._groups),
        )

    def since(self, before: Reading) -> Load:
        """The load between ``before`` and now."""
        return load_between(before, self.read(), len(self.cores), self.missing)

    def leave_out(self, before: Reading) -> None:
        """What passed since ``before`` does not count in ``whole``: nothing was measured then."""
        self._left_out.append((before, self.read()))

    def whole(self) -> Load:
        """The load since the meter was made, but for what was left out."""
        return self.since(moved(self.begin, self._left_out))

    def quota(self) -> float | None:
        """Cores' worth of time that the strictest cgroup of this process allows; None without a limit."""
        return min((q for folder in self._groups if (q := quota_cores(folder)) is not None), default=None)

    def programs(self, seconds: float) -> list[Program]:
        """Other programs by the part of a core that they have within the next ``seconds``, the busiest first."""
        before, begin = self._others(), time.monotonic()
        time.sleep(seconds)
        elapsed = time.monotonic() - begin
        found = [
            Program(pid, name, (now - before[pid][1]) / elapsed)
            for pid, (name, now) in self._others().items()
            if pid in before and now > before[pid][1]
        ]
        return sorted(found, key=lambda program: -program.share)

    def _others(self) -> dict[int, tuple[str, float]]:
        """Name and processor seconds of every process that can be seen and is not ours."""
        found = {}
        for entry in self.proc.iterdir():
            if entry.name.isdigit() and int(entry.name) not in self._shares and (text := _text(entry / "stat")):
                found[int(entry.name)] = (text[text.find("(") + 1 : text.rfind(")")], process_seconds(text))
        return found


def load_between(before: Reading, after: Reading, cores: int, missing: tuple[str, ...]) -> Load:
    """Two readings compared; parts of ``cores`` times the time between them, from 0 to 1."""
    seconds = after.at - before.at
    whole = max(seconds, 1e-9)

    def part(old: float | None, new: float | None, of: float) -> float | None:
        return None if old is None or new is None else min(max((new - old) / of, 0.0), 1.0)

    steal = None
    if before.cores and after.cores:
        others = after.cores.busy - before.cores.busy - (after.own - before.own)
        foreign = part(0.0, others, cores * whole)
        steal = part(before.cores.steal, after.cores.steal, cores * whole)
    else:
        foreign = part(before.inside, after.inside, cores * whole)
    return Load(
        seconds=seconds,
        foreign=foreign,
        steal=steal,
        pressure=part(before.pressure, after.pressure, whole),
        throttled=part(before.throttled, after.throttled, whole),
        missing=missing,
    )


def moved(begin: Reading, spans: Sequence[tuple[Reading, Reading]]) -> Reading:
    """``begin`` later by all that passed within the spans."""

    def later(value: float, ends: Sequence[tuple[float, float]]) -> float:
        return value + sum(after - before for before, after in ends)

    def of(name: str) -> Any:
        value, ends = getattr(begin, name), [(getattr(b, name), getattr(a, name)) for b, a in spans]
        if value is None or any(None in pair for pair in ends):
            return value
        if isinstance(value, Cores):
            return Cores(*(later(value[i], [(b[i], a[i]) for b, a in ends]) for i in range(len(value))))
        return later(value, ends)

    return Reading(**{field.name: of(field.name) for field in fields(Reading)})


def core_seconds(stat: str, cores: list[int]) -> Cores | None:
    """From /proc/stat: time of these cores in programs (user, nice, system), and stolen from them; None where it is
    not there, or has only zeros."""
    wanted, busy, steal, seen, whole = {f"cpu{core}" for core in cores}, 0, 0, 0, 0
    for line in stat.splitlines():
        name, _, rest = line.partition(" ")
        if name in wanted:
            ticks = [int(field) for field in rest.split()]
            busy, seen, whole = busy + sum(ticks[:3]), seen + 1, whole + sum(ticks)
            steal += ticks[7] if len(ticks) > 7 else 0
    return Cores(busy / TICKS, steal / TICKS) if seen == len(cores) and whole else None


def process_seconds(stat: str) -> float:
    """Processor seconds of a process from its /proc stat line; 0 where it has ended."""
    rest = stat.rpartition(")")[2].split()  # its name may hold spaces and brackets
    return (int(rest[11]) + int(rest[12])) / TICKS if len(rest) > 12 else 0.0


def pressure_seconds(text: str) -> float | None:
    """Seconds in which some task waited for a processor, from a pressure file."""
    for line in text.splitlines():
        if line.startswith("some "):
            return int(line.rpartition("total=")[2]) / 1e6
    return None


def group_seconds(folder: Path) -> float | None:
    """Processor seconds of all programs of a cgroup, version 2 (cpu.stat) or 1 (cpuacct.usage, ns)."""
    used = _text(folder / "cpuacct.usage").strip()
    if used.isdigit():
        return int(used) / 1e9
    for line in _text(folder / "cpu.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == "usage_usec":
            return int(value) / 1e6
    return None


def throttled_seconds(text: str) -> float | None:
    """Seconds in which a quota held a group back, from cpu.stat of a cgroup, version 2 (usec) or 1 (ns)."""
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name in ("throttled_usec", "throttled_time"):
            return int(value) / (1e6 if name == "throttled_usec" else 1e9)
    return None


def quota_cores(folder: Path) -> float | None:
    """The quota of one cgroup, version 2 (cpu.max) or 1 (cpu.cfs_quota_us)."""
    limit = _text(folder / "cpu.max").split()
    if not limit:
        limit = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    if len(limit) != 2 or not all(number.isdigit() for number in limit) or int(limit[1]) == 0:
        return None
    return int(limit[0]) / int(limit[1])


def cgroup_folders(text: str, root: Path) -> Iterator[Path]:
    """Folders of the cpu controller for the process whose /proc cgroup file is ``text``, its own before the roots."""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops = [root, root / "unified"]
        elif "cpu" in controllers.split(","):
            tops = [root / "cpu", root / controllers]
        else:
            continue
        for top in tops:
            folder = top / path.strip("/")
            yield from (f for f in (folder, *folder.parents) if f.is_relative_to(top) and f.is_dir())


def family(proc: Path, pid: int, parent: int) -> list[int]:
    """``pid``, its parent, and the parent's other children of this program: ranks, and a lab's competitors.

    Other children are foreign, such as a notebook's or a test's. Alone where the parent is the system's first process.
    """
    if parent <= 1:
        return [pid]
    found = [pid, parent]
    for entry in proc.iterdir():
        if entry.name.isdigit() and (rest := _text(entry / "stat").rpartition(")")[2].split()):
            command = _text(entry / "cmdline")
            if int(rest[1]) == parent and any(name in command for name in OWN_NAMES):
                found.append(int(entry.name))
    return list(dict.fromkeys(found))


def named(programs: list[Program]) -> str:
    """The busiest programs as text; those of other containers cannot be seen."""
    busy = [program for program in programs if program.share >= 0.1][:MOST_NAMED]
    if not busy:
        return "programs that cannot be seen from here"
    return ", ".join(f"{p.name} (process {p.pid}, {p.share:.0%} of a core)" for p in busy)


def first(values: Iterator[float | None]) -> float | None:
    return next((value for value in values if value is not None), None)


def _text(path: Path) -> str:
    """A small file of the kernel; empty where it is not there or may not be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""

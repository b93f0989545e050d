"""The lab's processor time: every rank gets a fixed share of its cores, always, as if it were a slower device.

How. Each rank has a cgroup whose weight is its share, and in it, on each of its cores, a competitor: a process that
spins in SCHED_IDLE. The rank's own threads go before it, at once; while they wait, it uses up the group's time. So each
group always claims its weight, one more group per core claims what no rank was given, and the scheduler divides the
core by weight, no matter who is waiting for whom. As it would settle this at its ticks only (4 ms at 250 Hz), a
real-time process per core wakes every 0.25 ms and does nothing else: each wake is a moment to switch.

Why not a quota (cpu.cfs_quota_us). A quota limits the average over its period, not the speed: after a wait a rank has
its whole quota to spend at full speed. Measured speeds are then those of no device: a rank is slow in a loop that
measures an operator, and fast in a model, where operators follow waits.

Measured (2-core Xeon at 2.0 GHz, Linux 6.18 at 250 Hz, examples/labs/two-hosts.yaml with its shares 0.56, 0.56, 0.28,
0.28; other programs ran beside it; gloo, float32 GEMMs 256 x 256 x 256):

================================================  ================  ================  ===================
what                                              quota 10 ms       quota 4 ms        this
================================================  ================  ================  ===================
ratio of the hosts' speeds in a loop (wanted: 2)  1.0               1.0               2.2 to 2.3
5 GEMMs after a wait, time over time in a loop    0.24 to 0.26      0.21 to 0.26      1.0 to 1.3
20 GEMMs after a wait                             0.68 to 0.75      0.70 to 0.99      0.7 to 1.1
80 GEMMs after a wait                             0.84 to 0.86      0.91 to 1.24      0.7 to 1.1
4 x (80 or 40 GEMMs + all-to-all), 10th to 90th   465 to 649 ms     350 to 629 ms     316-336, 345-394 ms
all-to-all of 1 KiB, median (10th to 90th)        4.5 (0.6-16) ms   3.9 (0.5-17) ms   2.9 (1.5-6.4) ms
8 bytes one way, between hosts, median            0.08 ms           0.10 ms           0.5 to 0.6 ms
4 MiB one way, between hosts, median              45 ms             52 ms             39 to 40 ms
================================================  ================  ================  ===================

The quota columns had one run each, at a load average of 8 to 10, this one two runs at 14 to 16; quotas cannot hold the
ratio beside other programs, since a quota promises no time. With little else running (load 2) they come near it, and
still a burst of 2 ms after a wait ran 2.9 to 3.3 times as fast as the loop at share 0.28 with a quota of 10 ms; it ran
0.8 to 1.4 times as fast here, waking every 0.5 ms. The period of the wakes, with a quarter of the weight against other
programs: small all-to-all 3.7 to 4.8 ms at 0.5 ms, 2.3 to 4.4 ms at 0.25 ms, 2.4 to 2.7 ms (one run) at 0.125 ms.

The price: a waiting rank of share 0.28 answers after 1 ms (90th percentile 1.6 ms, waking every 0.5 ms), as a slower
device would; the lab's cores are fully busy while it runs, and programs outside the lab run slowly meanwhile.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...spec.errors import MoeplanError

# What the ranks of one core may use of it together: the rest is for the kernel and for the launcher.
FULL = 0.95
# Weight of a whole core in the lab against 1024 of an ordinary process outside: each of those takes 3 % of its core.
CORE_WEIGHT = 1 << 15
COMPETITOR = Path(__file__).with_name("lab_competitor.py")


@dataclass(frozen=True)
class Hierarchy:
    """A mounted cpu cgroup controller: its weight file, that of an ordinary process, and the largest."""

    root: Path
    weight: str
    ordinary: int
    largest: int


def find_hierarchy(mounts: str) -> Hierarchy | None:
    """The cpu controller in the text of /proc/self/mounts: version 1 before version 2."""
    unified = None
    for line in mounts.splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            return Hierarchy(Path(where), "cpu.shares", 1024, 1 << 18)
        if kind == "cgroup2":
            unified = Hierarchy(Path(where), "cpu.weight", 100, 10_000)
    return unified


def hierarchy() -> Hierarchy:
    """Raises MoeplanError where there is none that can be written."""
    found = find_hierarchy(Path("/proc/self/mounts").read_text())
    if found is None or not os.access(found.root, os.W_OK):
        raise MoeplanError("the lab needs a writable cgroup hierarchy with the cpu controller (see /proc/self/mounts)")
    return found


def prepare() -> Path:
    """The hierarchy's root, its controller available to groups below it (version 2)."""
    found = hierarchy()
    control = found.root / "cgroup.subtree_control"
    if found.weight == "cpu.weight" and "cpu" not in control.read_text().split():
        try:
            control.write_text("+cpu")
        except OSError as error:
            raise MoeplanError(f"the lab cannot use the cpu controller of {found.root} ({error.strerror})") from None
    return found.root


def place(demands: Sequence[tuple[float, int]], cores: Sequence[int]) -> list[list[int]]:
    """Cores for ranks of (cpu_share, threads), so that no core's shares exceed FULL.

    A rank takes ``threads`` different cores with an equal part of its share on each. The least loaded core first, and
    if that fails the fullest that fits first, largest demands first. Raises MoeplanError naming the totals.
    """
    order = sorted(range(len(demands)), key=lambda r: -demands[r][0] / demands[r][1])
    for spread in (1, -1):
        load = dict.fromkeys(cores, 0.0)
        placed: dict[int, list[int]] = {}
        for r in order:
            share, threads = demands[r]
            fits = [core for core in cores if load[core] + share / threads <= FULL + 1e-9]
            own = sorted(fits, key=lambda core: spread * load[core])[:threads]
            if len(own) < threads:
                break
            placed[r] = sorted(own)
            for core in own:
                load[core] += share / threads
        else:
            return [placed[r] for r in range(len(demands))]
    total = sum(share for share, _ in demands)
    raise MoeplanError(
        f"the lab's ranks want cpu shares {[share for share, _ in demands]}, {total:g} in total: they do not fit into "
        f"{len(cores)} core(s) of {FULL:g} each; lower cpu_share or the number of ranks"
    )


class Shares:
    """The groups of one lab: one per rank, and one per core for the time that no rank was given."""

    def __init__(self, prefix: str, shares: Sequence[float], cores: Sequence[Sequence[int]]) -> None:
        self.prefix, self.shares, self.cores = prefix, shares, cores

        self.left = {core: 1.0 for own in cores for core in own}
        for share, own in zip(shares, cores, strict=True):
            for core in own:
                self.left[core] -= share / len(own)

    def build(self) -> None:
        found = hierarchy()
        core_weight = min(CORE_WEIGHT * found.ordinary / 1024, found.largest / max(1.0, *self.shares))
        wanted = {f"rank{r}": share for r, share in enumerate(self.shares)}
        wanted |= {f"rest{core}": left for core, left in self.left.items()}
        for name, share in wanted.items():
            group = found.root / (self.prefix + name)
            group.mkdir()
            (group / found.weight).write_text(str(max(2, round(share * core_weight))))

    @contextlib.contextmanager
    def held(self, processes: Sequence[int]) -> Iterator[None]:
        """Put each rank's process into its group, with the competitors that hold the shares."""
        root = hierarchy().root
        competitors: list[subprocess.Popen[bytes]] = []

        def compete(group: Path, core: int, kind: str) -> None:
            argv = [sys.executable, "-I", "-S", str(COMPETITOR), kind, str(os.getpid())]
            competitor = subprocess.Popen(argv, start_new_session=True, stdin=subprocess.PIPE)
            competitors.append(competitor)
            os.sched_setaffinity(competitor.pid, {core})
            (group / "cgroup.procs").write_text(str(competitor.pid))
            assert competitor.stdin is not None
            competitor.stdin.close()

        try:
            for r, (pid, own) in enumerate(zip(processes, self.cores, strict=True)):
                group = root / f"{self.prefix}rank{r}"
                for core in own:
                    compete(group, core, "spin")
                with contextlib.suppress(ProcessLookupError):  # it died: the supervisor names it
                    (group / "cgroup.procs").write_text(str(pid))
            for core in self.left:
                compete(root / f"{self.prefix}rest{core}", core, "spin")
                compete(root, core, "tick")
            yield
            if any(competitor.poll() is not None for competitor in competitors):
                raise MoeplanError("the lab could not hold its shares: a competitor ended early (see its error above)")
        finally:
            for competitor in competitors:
                competitor.kill()
                competitor.wait()

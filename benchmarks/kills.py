"""Kill a rank at random moments of endless steps of every strategy: is it named, and does anything stay behind?

    python -m moeplan.benchmarks.kills [--moments 100] [--cases "ep,sharded in chunks"] [--seed 0] [--output FILE.md]

Plans are what ``solve`` makes for tiny-moe and two to four devices, in three chunks where the case says so; four local
ranks stand for two hosts where the strategy has two levels. After the first steps, at a random moment within a second,
a random rank gets SIGKILL, SIGTERM or SIGSEGV. The run must end within its time-out in an error that names this rank
and the signal, with no process of any rank's session left, no file but the logs that the error names, and no file
descriptor more than before. Prints a Markdown table; the exit code is 1 where a moment failed.
"""

import argparse
import os
import random
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from moeplan import Plan, Workload
from moeplan.benchmarks.hardware import processor
from moeplan.benchmarks.synthetic_clusters import synthetic_cluster
from moeplan.planner.search import solve
from moeplan.runtime.launch import LocalLauncher
from moeplan.runtime.run import run
from moeplan.spec.catalogue import load_model
from moeplan.spec.document import write_atomically
from moeplan.spec.errors import RunError
from moeplan.spec.plan import CHUNKED, STRATEGIES
from moeplan.tests.killing import processes, ranks_of

HERE = Path(__file__).parent
IN_CHUNKS = {f"{strategy} in chunks": strategy for strategy in CHUNKED}
CASES = (*STRATEGIES, *IN_CHUNKS)
WORLDS = (2, 2, 3, 4)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV)
ENDLESS = 10**9
DISK = 1e8  # bytes per second
TIMEOUT, WITHIN = 30.0, 1.0  # seconds: the run's, and those in which the moment is drawn


class Moment(NamedTuple):
    """What was done, how long the run then took to end, and what was wrong (nothing: "")."""

    ranks: int
    rank: int
    signal: str
    seconds: float
    steps: int
    wrong: str


def plan_of(case: str, launcher: LocalLauncher) -> Plan:
    """A plan of this case for the launcher's ranks."""
    hosts = list(dict.fromkeys(seat.host for seat in launcher.seats))
    model = load_model("tiny-moe")
    cluster = synthetic_cluster(model, len(hosts), len(launcher.seats) // len(hosts), disk=DISK)
    workload, strategy = Workload.from_text("decode:48@32"), IN_CHUNKS.get(case, case)
    plan = solve(model, cluster, workload, strategy=strategy, even=True)
    if plan.offload is not None:  # half of the experts in memory, the others in a file of the run's folder
        held = max(m.total - m.weights // 2 for m in plan.predicted.memory)
        plan = solve(model, cluster, workload, strategy=strategy, even=True, memory_bytes=held)
        assert plan.offload is not None
        plan = plan.model_copy(update={"offload": plan.offload.model_copy(update={"folder": tempfile.gettempdir()})})
    if case in IN_CHUNKS:
        plan = plan.model_copy(update={"layers": tuple(p.model_copy(update={"chunks": 3}) for p in plan.layers)})
    seats = zip(plan.devices, launcher.seats, strict=True)
    devices = (device.model_copy(update={"host": seat.host, "cpu_share": seat.cpu_share}) for device, seat in seats)
    return plan.model_copy(update={"devices": tuple(devices)})


def launcher_of(case: str, draw: random.Random) -> LocalLauncher:
    """Two to four ranks; two hosts of two, by name, for what has two levels."""
    levels = IN_CHUNKS.get(case, case) == "hierarchical"
    launcher = LocalLauncher(4 if levels else draw.choice(WORLDS), threads=1)
    if levels:
        for seat, host in zip(launcher.seats, "aabb", strict=True):
            seat.host = host
    return launcher


class Killer:
    """Kills a rank of this process's run a while after its first steps."""

    def __init__(self, draw: random.Random, ranks: int) -> None:
        self.rank, self.number = draw.randrange(ranks), draw.choice(SIGNALS)
        self.after, self.steps = draw.uniform(0, WITHIN), 0
        self.pids: list[int] = []
        self.at = 0.0
        self.timer = threading.Timer(self.after, self._kill)

    def hear(self, event: dict[str, Any]) -> None:
        """``on_event`` of the run."""
        if event["what"].startswith("step "):
            self.steps = event["done"]
            if not self.pids:
                self.pids = ranks_of(os.getpid())
                self.timer.start()

    def _kill(self) -> None:
        self.at = time.monotonic()
        os.kill(self.pids[self.rank], self.number)


def kill_once(case: str, draw: random.Random) -> Moment:
    """One run of ``case`` that loses a rank."""
    launcher = launcher_of(case, draw)
    killer, ranks = Killer(draw, len(launcher.seats)), len(launcher.seats)
    before, said, wrong = open_files(), "no error at all", ""
    with tempfile.TemporaryDirectory() as folder:
        usual, tempfile.tempdir = tempfile.tempdir, folder
        try:
            run(plan_of(case, launcher), launcher, repetitions=ENDLESS, timeout=TIMEOUT, on_event=killer.hear)
        except RunError as error:
            said = str(error)
        finally:
            killer.timer.cancel()
            tempfile.tempdir = usual
        seconds = time.monotonic() - killer.at
        wanted = f"rank {killer.rank} (host {launcher.seats[killer.rank].host}): was killed by {killer.number.name}"
        alive = [pid for pid, _, session, _ in processes() if session in killer.pids]
        logs = {f"rank{rank}.log" for rank in range(ranks)}
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        if not said.startswith(wanted):
            wrong = f"wanted {wanted!r}, got {said!r}"
        elif seconds > TIMEOUT:
            wrong = f"took {seconds:.1f} s to end"
        elif alive:
            wrong = f"processes {alive} are left"
        elif {path.name for path in files} != logs or any(str(path.parent) not in said for path in files):
            wrong = f"files left: {', '.join(map(str, files))}"
        elif open_files() != before:
            wrong = f"{open_files()} open files, {before} before"
    return Moment(ranks, killer.rank, killer.number.name, seconds, killer.steps, wrong)


def open_files() -> int:
    """File descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def table(found: dict[str, list[Moment]]) -> str:
    """One line for each case; seconds: the median."""
    lines = [
        "| strategy | moments | right | seconds to the end, median | largest | ranks |",
        "|---|--:|--:|--:|--:|---|",
    ]
    for case, moments in found.items():
        seconds = [moment.seconds for moment in moments]
        right, worlds = sum(not moment.wrong for moment in moments), sorted({moment.ranks for moment in moments})
        figures = f"{len(moments)} | {right} | {median(seconds):.2f} | {max(seconds):.2f}"
        lines.append(f"| {case} | {figures} | {', '.join(map(str, worlds))} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=100, help="of each case")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated, by default all: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, ranks, signals and numbers of ranks")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "kills.md")
    args = parser.parse_args(arguments)
    cases = args.cases.split(",")
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"--cases: {unknown[0]!r} is none of {', '.join(CASES)}")
    draw, started = random.Random(args.seed), time.monotonic()
    command = shlex.join(["python", "-m", "moeplan.benchmarks.kills", *(arguments or sys.argv[1:])])
    found: dict[str, list[Moment]] = {case: [] for case in cases}
    text = ""
    for i in range(args.moments):
        for case, moments in found.items():
            moments.append(moment := kill_once(case, draw))
            print(f"{i + 1} {case}: {moment.wrong or f'right, {moment.seconds:.2f} s'}", file=sys.stderr)
        text = page(found, command, (time.monotonic() - started) / ((i + 1) * len(cases)))
        write(args.output, text)  # an interrupted run keeps its rounds
    print(text)
    sys.exit(1 if any(moment.wrong for moments in found.values() for moment in moments) else 0)


def page(found: dict[str, list[Moment]], command: str, each: float) -> str:
    """The whole result; each: seconds that a moment took."""
    wrong = [f"- {case}: {moment}\n" for case, moments in found.items() for moment in moments if moment.wrong]
    return (
        f"# A rank killed at random moments of endless steps\n\n{processor()}; `{command}`, {each:.1f} s for each "
        f"moment. Right: the error names the rank and the signal, and nothing is left.\n\n{table(found)}\n"
    ) + "".join(wrong)


def write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()

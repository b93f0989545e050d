"""``moeplan place`` as an anytime search, beside a yardstick: any program that places experts in a given time.

    python benchmarks/anytime.py T.npz ... [--busy] [--caps 1.02,1.1] [--limits 1,2,5,10] [--long 60]
        --yardstick "python annealer.py {trace} {devices} {hosts} {seconds} {out} {cap}"
        --referee "python referee.py {plan} {trace}"

Both fit the first half of each trace. The yardstick is run in turn with ours, once for every cap; it gets the fitted
part alone, as a trace of that part twice, so that its own first half is exactly what ours saw: nothing of what is
scored. The referee scores both on the second half (a JSON object with ``balance_mean``, ``boundary_cross_device`` and
``boundary_cross_host``). Ours is compared with the best of the yardstick's caps, for each crossing by itself, whose
balance is at most ``ALLOWED`` above ours: the columns "to it" are our crossings over those. ``--busy`` keeps every
processor busy with something else meanwhile. ``--long`` runs ours once more with so many seconds, which "to long" is
over. Seconds are those of the whole command.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

from moeplan.benchmarks.hardware import processor
from moeplan.benchmarks.inputs import PAGE
from moeplan.benchmarks.limits import busy_processors
from moeplan.spec.trace import Trace

ROOT = Path(__file__).parents[1]
ALLOWED = 0.005  # of held-out balance above ours
WORSE = 1.01  # times the yardstick's crossings, which is told
CAPS = (1.02, 1.05, 1.10, 1.15, 1.25, 1.40)
COLUMNS = (
    "trace",
    "limit",
    "s",
    "balance",
    "device",
    "host",
    "device to it",
    "host to it",
    "device to long",
    "host to long",
)


@dataclass(frozen=True)
class Score:
    """Held out."""

    balance: float
    device: float
    host: float


@dataclass(frozen=True)
class Row:
    """ours after ``seconds`` with a limit, the yardstick's best crossings at our balance, and ours of a long run."""

    trace: str
    limit: float
    seconds: float
    ours: Score
    theirs: tuple[float, float] | None
    long: Score | None

    @property
    def ratios(self) -> tuple[float, float] | None:
        """Device, host; None where no cap of the yardstick was as balanced."""
        return (self.ours.device / self.theirs[0], self.ours.host / self.theirs[1]) if self.theirs else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--yardstick", required=True)
    parser.add_argument("--referee", required=True)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--limits", type=numbers, default=(1.0, 2.0, 5.0, 10.0))
    parser.add_argument("--caps", type=numbers, default=CAPS)
    parser.add_argument("--long", type=float, default=0.0)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "anytime.md")
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, busy_processors() if args.busy else nullcontext():
        bench = Bench(args, Path(folder))
        for path in args.traces:
            for row in bench.rows(path):
                rows.append(row)
                print(line(row), flush=True)
    args.output.write_text(report(rows, args.busy))


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


class Bench:
    """Runs and scores; work: a folder of its own."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work

    def rows(self, path: Path) -> list[Row]:
        """All limits of one trace."""
        fitted = self.work / "fitted.npz"
        twice(Trace.read(path).part(0, 0.5), fitted)
        long = self.ours(path, self.args.long)[0] if self.args.long else None
        found = []
        for limit in self.args.limits:
            ours, seconds = self.ours(path, limit)
            theirs = [self.theirs(path, fitted, limit, cap) for cap in self.args.caps]
            found.append(Row(path.stem, limit, seconds, ours, best(theirs, ours), long))
        return found

    def ours(self, path: Path, limit: float) -> tuple[Score, float]:
        out, args = self.work / "ours.json", self.args
        command = [sys.executable, "-m", "moeplan", "place", "--trace", str(path), "--fit", "0:0.5", "-o", str(out)]
        command += ["--devices", str(args.devices), "--hosts", str(args.hosts), "--time-limit", str(limit)]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return self.score(out, path), time.perf_counter() - began

    def theirs(self, path: Path, fitted: Path, limit: float, cap: float) -> Score:
        out, args = self.work / "theirs.json", self.args
        fields = {
            "trace": fitted,
            "devices": args.devices,
            "hosts": args.hosts,
            "seconds": limit,
            "out": out,
            "cap": cap,
        }
        subprocess.run([part.format(**fields) for part in shlex.split(args.yardstick)], check=True, capture_output=True)
        return self.score(out, path)

    def score(self, plan: Path, path: Path) -> Score:
        command = [part.format(plan=plan, trace=path) for part in shlex.split(self.args.referee)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return Score(found["balance_mean"], found["boundary_cross_device"], found["boundary_cross_host"])


def twice(part: Trace, path: Path) -> None:
    """A trace whose first half, however it is cut, is ``part``: that part twice, as two sequences."""
    Trace.of(
        np.concatenate([part.expert_ids] * 2),
        part.num_experts,
        expert_weights=np.concatenate([part.expert_weights] * 2),
        seq_len=np.array([part.tokens] * 2),
    ).write(path)


def best(theirs: Sequence[Score], ours: Score) -> tuple[float, float] | None:
    """The least crossings, each by itself, of those about as balanced as ours."""
    fair = [score for score in theirs if score.balance <= ours.balance + ALLOWED]
    return (min(score.device for score in fair), min(score.host for score in fair)) if fair else None


def line(row: Row) -> str:
    """Of the table."""
    ours, cells = row.ours, [row.trace, f"{row.limit:g}", f"{row.seconds:.1f}"]
    cells += [f"{ours.balance:.3f}", f"{ours.device:.3f}", f"{ours.host:.3f}"]
    cells += [f"{ratio:.3f}" for ratio in row.ratios] if row.ratios else ["-", "-"]
    long = row.long
    cells += [f"{ours.device / long.device:.3f}", f"{ours.host / long.host:.3f}"] if long else ["-", "-"]
    return f"| {' | '.join(cells)} |"


def report(rows: Sequence[Row], busy: bool) -> str:
    """The whole file."""
    ratios = [ratio for row in rows if row.ratios for ratio in row.ratios]
    command = shlex.join(["python", "benchmarks/anytime.py", *sys.argv[1:]])
    where = "all processors busy with something else" if busy else "nothing else started"
    told = "no limit had a yardstick as balanced"
    if ratios:
        worse = sum(ratio > WORSE for ratio in ratios)
        told = f"mean of {len(ratios)} ratios {statistics.mean(ratios):.3f}, largest {max(ratios):.3f}, "
        told += f"{worse} above {WORSE}"
    head = f"# Anytime\n\n{date.today()}, {processor()}, {where}. Command {PAGE}:\n\n    {command}\n\n{told}.\n"
    table = [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS), *map(line, rows)]
    return head + "\n" + "\n".join(table) + "\n"


if __name__ == "__main__":
    main()

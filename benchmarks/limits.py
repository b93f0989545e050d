"""Time limits under load: ten limits between 1 and 30 s, every processor kept busy, the wall clock of whole commands.

    python -m moeplan.benchmarks.limits                  # all shapes, about seven minutes
    python -m moeplan.benchmarks.limits --quick          # small shapes and limits, about a minute

Printed per command: its limit, what it took from start to end, the most that is allowed (1.2 x + 1 s), how it ended.
For information, what a command that does nothing takes meanwhile (``start_up``) stands above.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moeplan.spec.catalogue import load_model
from moeplan.tests.routings import chained_trace
from moeplan.tests.synthetic import cluster

FACTOR, EXTRA = 1.2, 1.0  # allowed: so many times the limit, and so many seconds
LIMITS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 18.0, 24.0, 30.0)
QUICK = (1.3, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)

HOSTS = ("--devices", "32", "--hosts", "4")
DEEPSEEK = ("place", "--trace", "58x256.npz", *HOSTS, "--groups", "8", "--fit", "0:0.5")
QWEN = ("place", "--trace", "89x160.npz", *HOSTS, "--fit", "0:0.5")
TIMED = ("place", "--trace", "tiny-moe.npz", "--cluster", "tiny-moe.json", "--model", "tiny-moe")
SOLVE = ("solve", "--model", "mixtral", "--cluster", "mixtral.json", "--workload", "prefill:512")
CASES = (
    DEEPSEEK,
    QWEN,
    DEEPSEEK,
    (*DEEPSEEK, "--slots", "320"),
    DEEPSEEK,
    (*DEEPSEEK, "--slots", "320", "--movement", "ep", "--shares", "optimal"),
    (*TIMED, "--slots", "20"),
    (*DEEPSEEK, "--pareto", "front.png"),
    SOLVE,
    (*QWEN, "--movement", "ep"),
)
SMALL = ("place", "--trace", "12x64.npz", "--devices", "8", "--hosts", "2", "--fit", "0:0.5")
QUICK_CASES = (
    SMALL,
    (*SMALL, "--groups", "4"),
    (*SMALL, "--slots", "80"),
    (*SMALL, "--slots", "80", "--movement", "ep", "--shares", "optimal"),
    ("solve", "--model", "tiny-moe", "--cluster", "tiny-moe.json", "--workload", "prefill:512"),
    (*SMALL, "--pareto", "front.png"),
    (*SMALL, "--objective", "balance", "--groups", "4", "--slots", "80", "--equal-slots"),
    TIMED,
    (*SMALL, "--movement", "ep"),
    SMALL,
)


@dataclass(frozen=True)
class Outcome:
    """What one command took; status: of the answer, or how it failed."""

    limit: float
    seconds: float
    status: str
    command: str

    @property
    def allowed(self) -> float:
        return FACTOR * self.limit + EXTRA

    @property
    def kept(self) -> bool:
        return self.seconds <= self.allowed and not self.status.startswith("failed")


@contextmanager
def busy_processors(count: int | None = None) -> Iterator[None]:
    """One busy loop for each processor, as others on a shared machine."""
    loops = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(count or os.cpu_count() or 1)]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.join()


def _spin() -> None:
    while True:
        pass


def run(arguments: Sequence[str], limit: float, folder: Path) -> Outcome:
    """One command with a time limit; from before its process begins to after its end."""
    output = folder / "answer.json"
    output.unlink(missing_ok=True)
    command = [*arguments, "--time-limit", f"{limit:g}"]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "moeplan", *command, "-o", str(output)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        return Outcome(limit, seconds, f"failed: {done.stderr.strip()[-300:]}", " ".join(command))
    return Outcome(limit, seconds, json.loads(output.read_text())["solver"]["status"], " ".join(command))


def start_up(folder: Path) -> float:
    """Seconds of a command that only says what it could do: what no limit can go below, on this machine as it is."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "moeplan", "place", "--help"]
    subprocess.run(command, cwd=folder, capture_output=True, check=True)
    return time.perf_counter() - began


def write_inputs(folder: Path, shapes: Sequence[tuple[int, int, int, int]]) -> None:
    """Traces of (layers, experts, tokens, top-k) with affinity between layers; a cluster and its model."""
    for layers, experts, tokens, top_k in shapes:
        chained_trace(0, layers, experts, tokens, top_k).write(folder / f"{layers}x{experts}.npz")
    for name in ("tiny-moe", "mixtral"):
        model = load_model(name)
        cluster(model, memory=2.0**38, dtype=model.dtype).write(folder / f"{name}.json")
    tiny = load_model("tiny-moe")
    moe = tiny.moe_block().moe
    assert moe is not None
    chained_trace(0, len(tiny.moe_layers), moe.num_experts, 2048, moe.top_k).write(folder / "tiny-moe.npz")


def table(outcomes: Sequence[Outcome]) -> str:
    """For people, and for markdown."""
    rows = ["| limit (s) | took (s) | allowed (s) | ended | command |", "|---:|---:|---:|---|---|"]
    for o in outcomes:
        ended = o.status if o.kept else f"**{o.status}**"
        rows.append(f"| {o.limit:g} | {o.seconds:.2f} | {o.allowed:.1f} | {ended} | `{o.command}` |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="small shapes and limits, about a minute")
    quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes = ((12, 64, 2048, 4),) if quick else ((58, 256, 8192, 8), (89, 160, 8192, 8))
        write_inputs(folder, shapes)
        cases = QUICK_CASES if quick else CASES
        outcomes = []
        with busy_processors():
            print(f"start-up: {start_up(folder):.2f} s", flush=True)
            for case, limit in zip(cases, QUICK if quick else LIMITS, strict=True):
                outcomes.append(run(case, limit, folder))
                print(table(outcomes).splitlines()[-1], flush=True)
        print("\n" + table(outcomes))
        sys.exit(0 if all(outcome.kept for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()

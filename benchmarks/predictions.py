"""Predicted beside measured on this machine: tiny-moe, two local ranks, seven workloads by three strategies.

    python benchmarks/predictions.py [--busy] [--trace examples/tiny_moe/trace.npz] [--output FILE.md]

Types what a user types: one ``moeplan profile``, then ``solve`` and ``run`` for each case; about seven minutes. With
``--busy`` two foreign loops come and go at random while the machine is profiled. The last column is the prediction
re-scaled by the probe that ``run`` makes beside its steps: it shows how far the machine has drifted since.
"""

import argparse
import json
import multiprocessing
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

from moeplan.benchmarks.hardware import processor
from moeplan.spec.document import write_atomically
from moeplan.spec.plan import IN_MEMORY

WORKLOADS = (
    "prefill:128",
    "prefill:512",
    "prefill:1024@256",
    "prefill:4096",
    "decode:2@64",
    "decode:16@128",
    "decode:128@32",
)
MODEL = "tiny-moe"
HERE = Path(__file__).parent
LOCAL = tuple(strategy for strategy in IN_MEMORY if strategy != "hierarchical")  # one host has one level


def moeplan(folder: Path, *arguments: str) -> None:
    """One command; what it says is shown where it fails."""
    command = [sys.executable, "-m", "moeplan", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


@contextmanager
def foreign_loops(count: int) -> Iterator[None]:
    """Processes that compute and rest in turn, each for 0.2 to 4 s."""
    loops = [multiprocessing.Process(target=_come_and_go, args=[seed], daemon=True) for seed in range(count)]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.join()


def _come_and_go(seed: int) -> None:
    draw = random.Random(seed)
    while True:
        end = time.monotonic() + draw.uniform(0.2, 4)
        while time.monotonic() < end:
            pass
        time.sleep(draw.uniform(0.2, 4))


def case(folder: Path, trace: Path, workload: str, strategy: str) -> tuple[float, float, float, float | None]:
    """Predicted and measured ms, spread of the steps, and the re-scaled prediction."""
    chosen = ("--model", MODEL, "--cluster", "cluster.json", "--trace", str(trace), "--strategy", strategy)
    moeplan(folder, "solve", *chosen, "--workload", workload, "--output", "plan.json")
    moeplan(folder, "run", "plan.json", "--output", "report.json", "--tolerance", "100")
    report = json.loads((folder / "report.json").read_text())
    step, rescaled = report["step"], report["machine"]["rescaled"]
    return step["predicted"] * 1e3, step["measured"] * 1e3, step["spread"], rescaled and rescaled["predicted"] * 1e3


def table(rows: Sequence[tuple[str, str, float, float, float, float | None]], busy: bool) -> str:
    errors = [predicted / measured - 1 for _, _, predicted, measured, _, _ in rows]
    lines = [
        "# Predicted and measured on one machine",
        "",
        f"{MODEL}, 2 local ranks, {processor()}, Linux {platform.release()}; "
        f"`python benchmarks/predictions.py{' --busy' if busy else ''}`. Error: predicted over measured less one; "
        "spread: (90th - 10th percentile) / median of the steps.",
        "",
        "| workload | strategy | predicted ms | measured ms | spread | error | re-scaled ms |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for (workload, strategy, predicted, measured, spread, rescaled), error in zip(rows, errors, strict=True):
        again = f"{rescaled:.1f}" if rescaled else ""
        cells = (workload, strategy, f"{predicted:.1f}", f"{measured:.1f}", f"{spread:.0%}", f"{error:+.1%}", again)
        lines.append(f"| {' | '.join(cells)} |")
    sizes = [abs(error) for error in errors]
    return "\n".join([*lines, "", f"{len(rows)} cases, mean error {mean(sizes):.1%}, worst {max(sizes):.1%}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", action="store_true", help="two foreign loops come and go during the profile")
    parser.add_argument("--trace", type=Path, default=HERE.parent / "examples" / "tiny_moe" / "trace.npz")
    parser.add_argument("--output", type=Path, help="a Markdown file for the table")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with foreign_loops(2 if arguments.busy else 0):
            moeplan(folder, "profile", "--model", MODEL, "--output", "cluster.json")
        for workload in WORKLOADS:
            for strategy in LOCAL:
                if strategy == "coherent" and not workload.startswith("decode"):
                    continue
                found = case(folder, arguments.trace.absolute(), workload, strategy)
                rows.append((workload, strategy, *found))
                print(f"{workload} {strategy}: {found[0]:.1f} ms predicted, {found[1]:.1f} measured", file=sys.stderr)
    text = table(rows, arguments.busy)
    print(text)
    if arguments.output:
        write_atomically(arguments.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()

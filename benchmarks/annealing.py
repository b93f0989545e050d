"""What more proposals, several chains, splicing them, and other parts bring to the annealing of placements.

    python benchmarks/annealing.py                          the shipped trace, 4 devices of 2 hosts
    python benchmarks/annealing.py T.npz ... --devices 8    others

Every trace is fitted on its first half and annealed at EPLB's balance, several seeds. All ways make equally many
proposals, scouts apart: "price followed" is without them, the balance held to its cap at every temperature, and
"experts alone" without moves of whole devices. Columns: median objective over the seeds (and how far they spread), over
the best that any row found, and seconds; a single chain has one thread.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from unittest.mock import patch

import numpy as np
from rich.console import Console
from rich.table import Table

from moeplan.benchmarks.hardware import processor
from moeplan.benchmarks.inputs import PAGE
from moeplan.planner.budget import Budget
from moeplan.planner.place.cap import balance_range
from moeplan.planner.place.fleet import Fleet, even_fleet
from moeplan.planner.place.sample import load_samples
from moeplan.planner.place.single import Single
from moeplan.solvers.placement import annealing
from moeplan.solvers.placement import chain as annealing_chain
from moeplan.solvers.placement import walks as annealing_walks
from moeplan.solvers.placement.annealing import FOLLOWERS, usual_chains, usual_steps
from moeplan.solvers.placement.walks import GENERATIONS
from moeplan.spec.trace import Trace

ROOT = Path(__file__).parents[1]
PARTS = (0.1, 0.3, 1.0)  # of the usual proposals
WAYS = ("one chain", "chains", "chains, spliced", "spliced, price followed", "spliced, experts alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path, default=[ROOT / "examples" / "tiny_moe" / "trace.npz"])
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "annealing.md")
    args = parser.parse_args()
    console = Console(width=120)
    command = " ".join(["python benchmarks/annealing.py", *sys.argv[1:]])
    lines = [f"# Annealing\n\n{date.today()}, {processor()}. Command: `{command}` {PAGE}"]
    for path in args.traces:
        trace = Trace.read(path).part(0, 0.5)
        title = f"{path.parent.name}/{path.stem}: {trace.layers} x {trace.num_experts}, {args.devices} devices"
        rows = compare(trace, args.devices, args.hosts, args.seeds)
        table = Table(*rows[0], title=title)
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
        body = [f"| {' | '.join(row)} |" for row in rows]
        lines += [f"\n## {title}\n", body[0], "|" + " --- |" * len(rows[0]), *body[1:]]
        args.output.write_text("\n".join(lines) + "\n")


def compare(trace: Trace, devices: int, hosts: int, seeds: int) -> list[tuple[str, ...]]:
    """Header and rows of the table."""
    single = Single(Fleet.of(even_fleet(devices, hosts, trace.num_experts, False)))
    load, affinity = load_samples(trace), single.affinity(trace)
    cap = balance_range(single, trace, Budget.of(math.inf)).usual
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for part in PARTS:
        usual = usual_steps(load[0].size)
        steps, chains = int(part * usual), usual_chains(usual)
        whole = chains + GENERATIONS * min(FOLLOWERS, chains)
        for seed in range(seeds):
            for way in WAYS:
                count = {"one chain": 1, "chains": whole}.get(way, chains)
                each = steps * whole if count == 1 else steps
                with only(way):
                    began = time.perf_counter()
                    placed = replace(single, seed=seed).solve(affinity, load, cap=cap, steps=each, chains=count)
                    seconds = time.perf_counter() - began
                found.setdefault((way, steps * whole), []).append((placed.objective, seconds))
    best = min(objective for runs in found.values() for objective, _ in runs)
    rows: list[tuple[str, ...]] = [("way", "proposals", "objective over the best", "spread", "s")]
    for (name, steps), runs in sorted(found.items(), key=lambda item: (item[0][1], WAYS.index(item[0][0]))):
        objectives = np.array([objective for objective, _ in runs]) / best - 1
        middle, spread = np.median(objectives), objectives.max() - objectives.min()
        seconds = statistics.median(seconds for _, seconds in runs)
        rows.append((name, f"{steps:,}", f"{middle:+.1%}", f"{spread:.1%}", f"{seconds:.2f}"))
    return rows


@contextmanager
def only(way: str) -> Iterator[None]:
    """Annealing as one of ``WAYS``."""
    with ExitStack() as patches:
        if way == "spliced, experts alone":
            patches.enter_context(patch.object(annealing_chain, "RELABEL", 10**9))
        if way == "spliced, price followed":
            patches.enter_context(patch.object(annealing_walks.Walks, "scout", lambda *_: None))
            patches.enter_context(patch.object(annealing_chain, "HELD", 0.0))
        if way == "chains":
            for module in (annealing, annealing_walks):
                patches.enter_context(patch.object(module, "GENERATIONS", 0))
            patches.enter_context(patch.object(annealing, "splice", lambda *_: None))
        yield


if __name__ == "__main__":
    main()

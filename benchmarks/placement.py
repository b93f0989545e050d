"""Placement on recorded routing, fitted on the first half of each trace and scored on the second.

    python benchmarks/placement.py TRACE.npz ... [--referee SCORER.py] [--baseline EPLB.json]

Every placement comes from the command line, `moeplan place`, with its default time limit; scores come from an
independent scorer where one is given, else from moeplan's own. Parts:

- locality at EPLB's balance for (devices, hosts) = (4, 2), (8, 2), (16, 4), beside EPLB and linear; the baseline given
  may have been fitted on other tokens, so EPLB fitted on those that moeplan saw stands beside it;
- locality alone, and 12.5 % spare slots, at (8, 2);
- unequal devices: one host half as fast, one device with half the memory, on a synthetic cluster (analytic curves);
- DeepSeek-V3's size, 58 x 256 on 32 devices of 4 hosts, single copies and 288 slots, on a synthetic trace of topics.

Prints the tables and writes them, with hardware and command, to benchmarks/results/placement.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from moeplan.benchmarks.hardware import processor
from moeplan.benchmarks.inputs import PAGE
from moeplan.planner.memory import replicated_weights
from moeplan.planner.place.compared import baseline_slots
from moeplan.planner.place.fleet import Fleet, even_fleet
from moeplan.planner.place.layers import document_layers
from moeplan.planner.place.score import score
from moeplan.planner.place.solve import Request
from moeplan.spec import Placement, Trace
from moeplan.spec.catalogue import load_model

ROOT = Path(__file__).parents[1]
SHAPES = ((4, 2), (8, 2), (16, 4))
MODELS = {(26, 64): "deepseek-v2-lite", (24, 32): "gpt-oss-20b"}  # by layers and experts
FIELDS = ("balance_mean", "boundary_cross_host", "boundary_cross_device", "fanout_host")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--referee", type=Path, help="independent scorer, called as SCORER PLACE.json TRACE.npz")
    parser.add_argument("--baseline", type=Path, help="its scores for EPLB: {scores: {'folder/name devices,hosts': …}}")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "placement.md")
    args = parser.parse_args()
    known = json.loads(args.baseline.read_text())["scores"] if args.baseline else {}
    console = Console(width=150)
    report = Report(console, args.referee, known)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    head = f"# Placement\n\n{date.today()}, {processor()}. "
    command = " ".join(["python benchmarks/placement.py", *map(str, sys.argv[1:])])
    parts: list[Callable[[], None]] = [
        partial(part, args.traces) for part in (report.balanced, report.local, report.spare, report.unequal)
    ]
    parts.append(report.large)
    for run in parts:
        run()
        # After every part: they take minutes.
        args.output.write_text(head + f"Command: `{command}` {PAGE}\n" + "\n".join(report.lines) + "\n")


class Report:
    """Places, scores, and collects the lines of the tables."""

    def __init__(self, console: Console, referee: Path | None, known: dict[str, Any]) -> None:
        self.console, self.referee, self.known = console, referee, known
        self.lines: list[str] = []
        self.folder = Path(tempfile.mkdtemp(prefix="placement-"))

    def balanced(self, traces: list[Path]) -> None:
        self._head(
            "Locality at EPLB's balance, single copies (held out)",
            "case | balance | EPLB | EPLB, same part | linear | x host | of EPLB | x device | of EPLB | fan-out host | "
            "gap | s",
        )
        ratios, over = [], []
        for trace in traces:
            for devices, hosts in SHAPES:
                placement, mine, seconds = self._place(trace, devices, hosts)
                usual = self._usual(trace, devices, hosts, "eplb")
                linear = self._usual(trace, devices, hosts, "linear")
                far, near = (mine[f] / usual[f] for f in ("boundary_cross_host", "boundary_cross_device"))
                ratios.append((far, near))
                same = placement.scores["eplb"].held_out
                assert same is not None
                over.append(mine["balance_mean"] - np.array([usual["balance_mean"], same.balance_mean]))
                self._row(
                    f"{name(trace)} ({devices}, {hosts}) | {mine['balance_mean']:.3f} | {usual['balance_mean']:.3f} | "
                    f"{same.balance_mean:.3f} | {linear['balance_mean']:.3f} | {mine['boundary_cross_host']:.3f} | "
                    f"{far:.2f} | {mine['boundary_cross_device']:.3f} | {near:.2f} | {mine['fanout_host']:.2f} of "
                    f"{usual['fanout_host']:.2f} | {placement.solver.gap:.0%} | {seconds:.0f}"
                )
        (far, near), (published, fitted) = np.array(ratios).T, np.array(over).T
        self._say(
            f"Mean over {len(ratios)} cases: crossings between hosts {far.mean():.3f}, between devices "
            f"{near.mean():.3f} of EPLB's; largest {far.max():.2f} and {near.max():.2f}. "
            f"{above('that of EPLB', published)} {above('that of EPLB fitted on the same tokens', fitted)}"
        )

    def local(self, traces: list[Path]) -> None:
        self._head("Locality alone at (8, 2) (held out)", "trace | x device | x host | balance | gap | s")
        for trace in traces:
            placement, mine, seconds = self._place(trace, 8, 2, "--objective", "locality")
            self._row(
                f"{name(trace)} | {mine['boundary_cross_device']:.3f} | {mine['boundary_cross_host']:.3f} | "
                f"{mine['balance_mean']:.3f} | {placement.solver.gap:.0%} | {seconds:.0f}"
            )

    def spare(self, traces: list[Path]) -> None:
        self._head(
            "12.5 % spare slots at (8, 2), or the next multiple of the devices (held out)",
            "trace | slots | balance | EPLB | fan-out host | EPLB | gap of balance | s",
        )
        for trace in traces:
            slots = -(-Trace.read(trace).num_experts * 9 // 64) * 8  # a multiple of the devices, as EPLB needs
            more = ("--slots", str(slots), "--equal-slots", "--shares", "optimal")
            placement, mine, seconds = self._place(trace, 8, 2, *more)
            usual = self._usual(trace, 8, 2, "eplb", slots)
            self._row(
                f"{name(trace)} | {slots} | {mine['balance_mean']:.3f} | {usual['balance_mean']:.3f} | "
                f"{mine['fanout_host']:.3f} | {usual['fanout_host']:.3f} | {placement.solver.gap:.1%} | {seconds:.0f}"
            )

    def unequal(self, traces: list[Path]) -> None:
        self._head(
            "One host half as fast, one device with half the memory (8, 2), predicted ms per step of 2,048 tokens",
            "trace | this | EPLB | less | linear | gap | s",
        )
        for trace in traces:
            read = Trace.read(trace)
            model = MODELS.get((read.layers, read.num_experts))
            if model is None:
                self._row(f"{name(trace)} | no catalogue model with {read.layers} x {read.num_experts} | | | | | ")
                continue
            cluster = self._unequal_cluster(model, read)
            placement, _, seconds = self._place(trace, 8, 2, "--cluster", str(cluster), "--model", model)
            rest = {n: s.held_out for n, s in placement.scores.items() if s.held_out}
            held = {n: 1e3 * s.step_seconds for n, s in rest.items() if s.step_seconds}
            less, gap = 1 - held["placement"] / held["eplb"], placement.solver.gap
            ours, theirs, linear = (f"{held[n]:.0f}" for n in ("placement", "eplb", "linear"))
            self._row(f"{name(trace)} | {ours} | {theirs} | {less:.1%} | {linear} | {gap:.0%} | {seconds:.0f}")

    def large(self) -> None:
        self._head(
            "DeepSeek-V3's size: 58 x 256, top-8, 32 devices of 4 hosts, synthetic trace (held out)",
            "slots | balance | EPLB | x host | EPLB | x device | EPLB | fan-out host | EPLB | s",
        )
        trace = topics(58, 256, 8, tokens=20_000).write(self.folder / "large.npz")
        for slots in (256, 288):
            more = ("--slots", str(slots), "--equal-slots", "--time-limit", "45")
            _, mine, seconds = self._place(trace, 32, 4, *more)
            usual = self._usual(trace, 32, 4, "eplb", slots)
            cells = ["-" if found.get(f) is None else f"{found[f]:.3f}" for f in FIELDS for found in (mine, usual)]
            self._row(f"{slots} | {' | '.join(cells)} | {seconds:.0f}")

    def _unequal_cluster(self, name: str, trace: Trace) -> Path:
        """Devices with slots for twice their even share of the experts, the first for just that share."""
        sys.path.insert(0, str(ROOT / "tests"))  # the analytic curves that the tests use
        from synthetic import cluster

        model = load_model(name)
        expert = sum(model.expert_bytes(i) for i in range(trace.layers))
        rest = replicated_weights(model.layers, model.vocab_size, model.tie_embeddings, 1, 2)
        share = trace.num_experts / 8 * expert * 1.02
        memory = [(rest + share) / 0.9, *[(rest + 2 * share) / 0.9] * 7]
        built = cluster(model, ((1, 1, 1, 1), (0.5, 0.5, 0.5, 0.5)), memory=memory, dtype=model.dtype)
        return built.write(self.folder / f"{name}.json")

    def _place(self, trace: Path, devices: int, hosts: int, *more: str) -> tuple[Placement, dict[str, float], float]:
        target = self.folder / "place.json"
        options = ["--trace", str(trace), "--fit", "0:0.5", "--devices", str(devices), "--hosts", str(hosts)]
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "moeplan", "place", *options, *more, "-o", str(target)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"moeplan place failed on {trace}:\n{done.stderr}")
        seconds = time.perf_counter() - began
        placement = Placement.read(target)
        return placement, self._scores(target, trace), seconds

    def _scores(self, place: Path, trace: Path) -> dict[str, float]:
        if self.referee is None:
            placement = Placement.read(place)
            return score(placement.layers, placement.devices, Trace.read(trace).part(0.5, 1)).model_dump()
        done = subprocess.run(
            [sys.executable, str(self.referee), str(place), str(trace)], capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    def _usual(self, trace: Path, devices: int, hosts: int, which: str, slots: int | None = None) -> dict[str, float]:
        """Scores of a baseline: as published for it, where they are given, else of our own implementation."""
        key = f"{name(trace)} {devices},{hosts}"
        if which == "eplb" and slots is None and key in self.known:
            return self.known[key]
        read = Trace.read(trace)
        count = slots or read.num_experts
        request = Request(even_fleet(devices, hosts, count, False), count, fit=(0.0, 0.5))
        layers = document_layers(baseline_slots(read.part(0, 0.5), request, Fleet.of(request.devices))[which])
        return score(layers, request.devices, read.part(0.5, 1)).model_dump()

    def _head(self, title: str, columns: str) -> None:
        self._say(f"\n## {title}\n")
        self._row(columns)
        self._row(" | ".join(["---"] * len(columns.split(" | "))))

    def _row(self, text: str) -> None:
        self._say(f"| {text} |")

    def _say(self, text: str) -> None:
        self.lines.append(text)
        self.console.print(text, highlight=False, markup=False)


def above(whose: str, over: np.ndarray) -> str:
    """In text: how far balance lies above another's; over: [cases]."""
    many = int((over > 0.02).sum())
    return f"Balance above {whose}: mean {over.mean():+.3f}, worst {over.max():+.3f}; {many} cases by more than 0.02."


def topics(layers: int, experts: int, top_k: int, *, tokens: int, count: int = 32, seed: int = 0) -> Trace:
    """Sequences of one topic each; a topic prefers some experts of every layer, loads are heavy-tailed."""
    rng = np.random.default_rng(seed)
    liking = rng.normal(0.0, 0.7, (layers, experts)) + rng.normal(0.0, 1.5, (count, layers, experts))
    length = 250
    ids = np.empty((tokens, layers, top_k), np.int64)
    for first in range(0, tokens, length):
        noise = rng.gumbel(size=(min(length, tokens - first), layers, experts))
        ids[first : first + length] = np.argsort(-(liking[rng.integers(count)] + noise), axis=2)[:, :, :top_k]
    return Trace.of(ids, experts, seq_len=np.full(tokens // length, length), source="synthetic topics")


def name(trace: Path) -> str:
    return f"{trace.parent.name}/{trace.stem}"


if __name__ == "__main__":
    main()

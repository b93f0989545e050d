"""Predicted beside measured in the lab: every strategy, both phases, the free choice, and uneven beside even splits.

    python benchmarks/lab.py [--lab examples/labs/two-hosts.yaml] [--model lab-moe] [--rounds 2] [--output FILE.md]

Measures the emulated cluster once, plans each case from that measurement alone, then runs all plans in turn, several
rounds, so that drift of the machine hits all alike. A case's measured time is the median over its rounds' medians.
Needs Linux and root. Writes a Markdown table with the hardware and this command.
"""

import argparse
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console

from moeplan import Cluster, Plan, Report, Workload
from moeplan.benchmarks.hardware import processor
from moeplan.benchmarks.inputs import named
from moeplan.planner.search import solve
from moeplan.profiler import profile
from moeplan.runtime.launch import Launcher
from moeplan.runtime.launch.choose import choose_launcher
from moeplan.runtime.run import run
from moeplan.spec.catalogue import load_model
from moeplan.spec.document import write_atomically
from moeplan.spec.plan import IN_MEMORY

WORKLOADS = ("prefill:512", "decode:16")
HERE = Path(__file__).parent
console = Console(stderr=True)


def strategies(workload: str) -> list[str]:
    """Those that can execute it."""
    return [name for name in IN_MEMORY if name != "coherent" or workload.startswith("decode")]


def plans(model_name: str, cluster: Cluster) -> dict[tuple[str, str], Plan]:
    """(workload, case) -> plan: each strategy alone, its even split, and the planner's free choice."""
    model = load_model(model_name)
    found: dict[tuple[str, str], Plan] = {}
    for text in WORKLOADS:
        workload = Workload.from_text(text)
        for strategy in strategies(text):
            found[text, strategy] = solve(model, cluster, workload, strategy=strategy)
            found[text, f"{strategy}, even"] = solve(model, cluster, workload, strategy=strategy, even=True)
        found[text, "free choice"] = solve(model, cluster, workload)
    return found


def measure(cases: dict[tuple[str, str], Plan], launcher: Launcher, rounds: int) -> dict[tuple[str, str], list[Report]]:
    """Run all cases in turn, ``rounds`` times."""
    reports: dict[tuple[str, str], list[Report]] = {key: [] for key in cases}
    for i in range(rounds):
        for key, plan in cases.items():
            report = run(plan, launcher, tolerance=10.0, step_budget=20.0)
            step = report.step
            console.print(f"round {i + 1} {key}: {step.predicted * 1e3:.1f} predicted, {step.measured * 1e3:.1f} ms")
            if report.check and not report.check.passed:
                sys.exit(f"{key}: output differs from the reference by {report.check.relative_error:.1e}")
            reports[key].append(report)
    return reports


def table(reports: dict[tuple[str, str], list[Report]]) -> tuple[str, dict[str, Any]]:
    """The Markdown table and its summary figures."""
    step: dict[tuple[str, str], float] = {key: median(r.step.measured for r in found) for key, found in reports.items()}
    predicted = {key: found[0].step.predicted for key, found in reports.items()}
    error = {key: predicted[key] / step[key] - 1 for key in reports}
    lines = ["| workload | plan | predicted ms | measured ms | spread | error |", "|---|---|--:|--:|--:|--:|"]
    for (workload, case), found in reports.items():
        key = (workload, case)
        spread = max(r.step.spread for r in found)
        figures = f"{predicted[key] * 1e3:.1f} | {step[key] * 1e3:.1f} | {spread:.0%} | {error[key]:+.1%}"
        lines.append(f"| {workload} | {case} | {figures} |")
    judged = [abs(error[key]) for key in reports if key[1] in IN_MEMORY]
    summary: dict[str, Any] = {"largest": max(judged), "mean": mean(judged)}
    for text in WORKLOADS:
        best = min(step[text, strategy] for strategy in strategies(text))
        summary[f"{text}: free choice over the best strategy"] = step[text, "free choice"] / best
        for strategy in strategies(text):
            summary[f"{text}: {strategy} uneven over even"] = step[text, strategy] / step[text, f"{strategy}, even"]
    return "\n".join(lines), summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", type=Path, default=HERE.parent / "examples/labs/two-hosts.yaml")
    parser.add_argument("--model", default="lab-moe")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cluster", type=Path, help="reuse this measurement")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "lab.md")
    args = parser.parse_args()
    show: Callable[[dict[str, Any]], None] = lambda event: console.print(event.get("what", ""), style="dim")  # noqa: E731
    with choose_launcher(lab=args.lab) as launcher:
        if args.cluster and args.cluster.exists():
            cluster = Cluster.read(args.cluster)
        else:
            cluster = profile(launcher, [load_model(args.model)], budget_seconds=150, on_event=show)
            if args.cluster:
                cluster.write(args.cluster)
        reports = measure(plans(args.model, cluster), launcher, args.rounds)
    body, summary = table(reports)
    figures = "\n".join(f"- {name}: {value:.3f}" for name, value in summary.items())
    machine = f"{processor()}, Linux {platform.release()}"
    text = (
        f"# Predicted and measured in the lab\n\n`{named(args.lab)}`, `{args.model}`, {machine}; "
        f"`python benchmarks/lab.py --rounds {args.rounds}`. Median over rounds; spread within a round (90th - 10th "
        f"percentile over median), the largest; error is predicted over measured less one.\n\n{body}\n\n{figures}\n"
    )
    write_atomically(args.output, lambda f: f.write(text.encode()))
    print(text)


if __name__ == "__main__":
    main()

"""Each published system's mechanism beside what it replaces, in the lab: does it win here, where, and by how much?

    python benchmarks/systems.py [--cases chunks,shortcut,...] [--rounds 3] [--output FILE.md]

Every case has a lab, a model and a workload of its own, made so that what the mechanism saves is there to be saved. Its
lab is measured once; its contenders are plans of the product (``solve``, or one of its plans changed in one field),
run in turn, several rounds. A step's measured time is the median over the rounds' medians. Needs Linux and root. Writes
a Markdown table with the hardware and this command.
"""

import argparse
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from moeplan import Cluster, Model, Plan, Report, Workload
from moeplan.benchmarks.hardware import processor
from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.profiler import profile
from moeplan.runtime.launch.choose import choose_launcher
from moeplan.runtime.run import run
from moeplan.spec.catalogue import load_model
from moeplan.spec.document import write_atomically
from moeplan.spec.model import Dense
from moeplan.spec.shortcut import WINDOWS

HERE = Path(__file__).parent
PROFILE_SECONDS, STEP_SECONDS = 100, 12.0
TRAVEL = ("dispatch", "combine")
console = Console(stderr=True)

Contenders = dict[str, Plan]


@dataclass(frozen=True)
class Case:
    """``lab``: YAML; ``contenders``: the plans by name, the baseline first; ``travel``: whether the seconds in which
    devices wait for tokens are what counts, instead of the whole step's."""

    claim: str
    lab: str
    model: Callable[[], Model]
    workload: str
    contenders: Callable[[Model, Cluster, Workload], Contenders]
    travel: bool = False


def lab(shares: tuple[float, ...], uplink: float, ranks: int = 2) -> str:
    """Hosts of ``ranks`` devices with so much of a core each, behind uplinks of so many Gbit/s."""
    hosts = "".join(f"  - {{name: h{i}, ranks: {ranks}, cpu_share: {share}}}\n" for i, share in enumerate(shares))
    return f"name: systems\nhosts:\n{hosts}uplink_gbit: {uplink}\n"


def again(plan: Plan, cluster: Cluster, **changes: int) -> Plan:
    """The plan with these fields in every layer, predicted anew."""
    layers = [layer.model_copy(update=changes) for layer in plan.layers]
    limits = [device.memory_bytes for device in plan.devices]
    predicted = Step.of(plan, cluster).predict(layers, plan.stored_layers, limits)
    return plan.model_copy(update={"layers": tuple(layers), "predicted": predicted})


def lab_model() -> Model:
    return load_model("lab-moe")


def shortcut(kind: str) -> Model:
    """Two pairs of a dense layer and one with experts and a dense FFN beside them; ``none``: the same without it."""
    (block,) = lab_model().blocks
    dense = Dense(ffn_size=2048, gated=True, activation="silu")
    first = block.model_copy(update={"count": 1, "moe": None, "dense": dense})
    second = block.model_copy(update={"count": 1, "shortcut": kind, "dense": None if kind == "none" else dense})
    blocks = (first, second, first, second) if kind != "none" else (first, first.model_copy(), second) * 2
    return lab_model().model_copy(update={"name": f"lab-{kind}", "blocks": blocks})


def chunk_contenders(model: Model, cluster: Cluster, workload: Workload) -> Contenders:
    best = solve(model, cluster, workload, strategy="ep")
    return {"at once": again(best, cluster, chunks=1)} | {
        f"{count} chunks": again(best, cluster, chunks=count) for count in (2, 4, 8)
    }


def shortcut_contenders(model: Model, cluster: Cluster, workload: Workload) -> Contenders:
    plain = shortcut("none")
    best = solve(model, cluster, workload)
    slots = {f"slot {slot}": again(best, cluster, slot=slot) for slot in range(len(WINDOWS["mid"]) + 1)}
    return {"no shortcut": solve(plain, cluster, workload, strategy="ep"), **slots, "chosen": best}


def uneven_contenders(model: Model, cluster: Cluster, workload: Workload) -> Contenders:
    found = {}
    for strategy in ("sharded", "gathered"):
        for even in (True, False):
            name = f"{strategy}, {'even' if even else 'uneven'}"
            found[name] = solve(model, cluster, workload, strategy=strategy, even=even)
    return found


CASES = {
    "chunks": Case(
        "FSMoE: tokens in chunks, where what travels and what is computed take about as long",
        lab((0.42, 0.42), 0.25),
        lab_model,
        "prefill:512",
        chunk_contenders,
    ),
    "shortcut": Case(
        "ScMoE: experts beside the backbone (seconds that devices wait for tokens)",
        lab((0.42, 0.42), 0.5),
        lambda: shortcut("mid"),
        "prefill:512",
        shortcut_contenders,
        travel=True,
    ),
    "chunks-long": Case(
        "FSMoE: the same with so many tokens that a chunk's calls are as efficient as whole ones",
        lab((0.84, 0.84), 0.3, ranks=1),
        lab_model,
        "prefill:4096",
        chunk_contenders,
    ),
    "shortcut-long": Case(
        "ScMoE: the same with so many tokens that a message's own time counts little",
        lab((0.84, 0.84), 0.5, ranks=1),
        lambda: shortcut("mid"),
        "prefill:4096",
        shortcut_contenders,
        travel=True,
    ),
    "uneven": Case(
        "HEXA-MoE: uneven splits at shares of 0.40 and 0.60",
        lab((0.93, 0.62), 10.0, ranks=1),
        lab_model,
        "prefill:512",
        uneven_contenders,
    ),
}


def seconds(case: Case, report: Report) -> tuple[float, float]:
    """(predicted, measured) of what counts."""
    if not case.travel:
        return report.step.predicted, report.step.measured
    parts = [part for part in report.parts if part.part in TRAVEL]
    return sum(part.predicted for part in parts), sum(part.measured for part in parts)


def measured(name: str, case: Case, rounds: int) -> str:
    """The case's table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lab.yaml"
        path.write_text(case.lab)
        model, workload = case.model(), Workload.from_text(case.workload)
        with choose_launcher(lab=path) as launcher:
            models = [model] if not case.travel else [model, shortcut("none")]
            cluster = profile(launcher, models, budget_seconds=PROFILE_SECONDS)
            plans = case.contenders(model, cluster, workload)
            reports: dict[str, list[Report]] = {contender: [] for contender in plans}
            for i in range(rounds):
                for contender, plan in plans.items():
                    report = run(plan, launcher, tolerance=10.0, step_budget=STEP_SECONDS)
                    if report.check and not report.check.passed:
                        sys.exit(f"{name}, {contender}: output differs by {report.check.relative_error:.1e}")
                    reports[contender].append(report)
                    console.print(f"{name}, round {i + 1}, {contender}: {seconds(case, report)}", style="dim")
    lines = [f"## {name}\n", f"{case.claim}. {model.name}, {workload}.\n"]
    lines += ["| plan | predicted ms | measured ms | of the first | spread | step ms |", "|---|--:|--:|--:|--:|--:|"]
    first = median(seconds(case, report)[1] for report in next(iter(reports.values())))
    for contender, found in reports.items():
        predicted, taken = seconds(case, found[0])[0], median(seconds(case, report)[1] for report in found)
        spread, step = max(report.step.spread for report in found), median(report.step.measured for report in found)
        lines.append(
            f"| {contender} | {predicted * 1e3:.1f} | {taken * 1e3:.1f} | {taken / first:.2f} | {spread:.0%} | "
            f"{step * 1e3:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "systems.md")
    args = parser.parse_args()
    asked = args.cases.split(",")
    if unknown := [name for name in asked if name not in CASES]:
        parser.error(f"--cases: {unknown[0]!r} is none of {', '.join(CASES)}")
    tables = [measured(name, CASES[name], args.rounds) for name in asked]
    command = f"python benchmarks/systems.py --cases {args.cases} --rounds {args.rounds}"
    text = (
        f"# Published mechanisms in the lab\n\n{processor()}, Linux {platform.release()}; `{command}`. "
        "Predicted from one measurement of each lab; measured: median over the rounds; spread: within a round "
        "(90th - 10th percentile over median), the largest.\n\n"
    )
    text += "\n".join(tables)
    write_atomically(args.output, lambda f: f.write(text.encode()))
    print(text)


if __name__ == "__main__":
    main()

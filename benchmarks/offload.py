"""Experts beyond memory: moeplan's offload beside copying on demand, on a recorded trace and a real disk.

    python -m moeplan.benchmarks.offload [--folder DIR] [--share 0.25] [--rounds 3] [--output FILE.md]

Two local ranks whose memory holds ``--share`` of their experts, places for those that are read included. The model has
the trace's layers and experts. What stays and what is read ahead is decided on the first half of the trace; the steps
are of the second half. All contenders have the same placement and the same memory:

    copying       what parameter offloading does: the first experts of every layer stay, the others are copied when they
                  are needed, one after the other, each before it is computed
    by need       the same with the experts that a step most likely needs in memory
    by list       experts are read ahead by the frequency with which they are needed, as fast as that is predicted
    foreseen      the same by what the layer before needs
    offload       what ``solve`` decides

Plans run in turn for several rounds; a time is the median over the rounds' medians.
"""

import argparse
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

from rich.console import Console

from moeplan import Cluster, Model, Plan, Report, Trace, Workload
from moeplan.benchmarks.hardware import processor
from moeplan.benchmarks.inputs import named
from moeplan.planner.foresight import follows, foresight_of, other_tokens
from moeplan.planner.offloading import AHEAD, NOTHING, likely, needs
from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.profiler import profile
from moeplan.runtime.launch import LocalLauncher
from moeplan.runtime.run import run
from moeplan.spec.document import write_atomically
from moeplan.spec.foresight import Foresight
from moeplan.spec.model import Attention, Block, Moe
from moeplan.spec.offload import Offload
from moeplan.spec.plan import LayerPlan

HERE = Path(__file__).parent
HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 512, 512, 8, 4, 64
console = Console(stderr=True)


def model_of(trace: Trace) -> Model:
    attention = Attention(heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    moe = Moe(num_experts=trace.num_experts, top_k=trace.top_k, ffn_size=FFN)
    block = Block(count=trace.layers, hidden_size=HIDDEN, attention=attention, moe=moe)
    return Model(name="offload-bench", family="benchmark", vocab_size=256, blocks=(block,), dtype="f32")


def limit_of(model: Model, cluster: Cluster, workload: Workload, trace: Trace | None, share: float) -> int:
    """Bytes in which so much of every device's experts fits, beside everything else."""
    whole = solve(model, cluster, workload, trace, strategy="offload")
    experts = max(sum(len(layer.slots[g]) for layer in whole.layers) for g in range(len(cluster.devices)))
    size = experts * model.computed_expert_bytes(0, "f32")
    return max(device.total for device in whole.predicted.memory) - int((1 - share) * size)


def on_demand(layers: tuple[LayerPlan, ...], places: tuple[int, ...], by_need: bool) -> list[LayerPlan]:
    """The same placement in the same memory, with one place: what stays is the plan's, or the first of every layer."""
    found = []
    for layer in layers:
        assert layer.resident is not None
        found.append(layer.model_copy(update={"ahead": ((),) * len(places)}))
    if by_need:
        return found
    for g, more in enumerate(places):
        if not more:  # everything stays
            continue
        kept = sum(len((layer.resident or ())[g]) for layer in layers) + max(more - 1, 0)
        each = [kept // len(layers) + (j < kept % len(layers)) for j in range(len(layers))]
        for j, layer in enumerate(found):
            resident = list(layer.resident or ())
            resident[g] = layer.slots[g][: each[j]]
            found[j] = layer.model_copy(update={"resident": tuple(resident)})
    return found


def reading_ahead(fitted: Plan, cluster: Cluster, trace: Trace) -> dict[str, tuple[list[LayerPlan], Offload]]:
    """With the experts in memory that ``fitted`` has there: the two ways to read ahead, each as it is predicted fastest
    on the step of ``fitted``, by the trace that it was decided on."""
    assert fitted.offload is not None
    step, experts = Step.of(fitted, cluster, trace), trace.num_experts
    needed = needs(trace.expert_counts / trace.tokens, fitted.workload.tokens)
    others = other_tokens(trace, fitted.workload, fitted.seed)

    def listed(least: float, layers: int) -> list[LayerPlan]:
        """With lists in the first layers."""
        found = []
        for j, layer in enumerate(fitted.layers):
            both = zip(layer.slots, layer.resident or (), strict=True)
            ahead = (likely(needed[j], held, set(stays), least if j < layers else NOTHING) for held, stays in both)
            found.append(layer.model_copy(update={"ahead": tuple(ahead)}))
        return found

    def fastest(ways: list[tuple[list[LayerPlan], Foresight | None]]) -> tuple[list[LayerPlan], Offload]:
        layers, foresight = min(ways, key=lambda way: replace(step, foresight=way[1]).seconds(way[0]))
        assert fitted.offload is not None
        return layers, fitted.offload.model_copy(update={"foresight": foresight})

    chances = follows(others, experts), len(others)
    return {
        "by list": fastest([(listed(least, len(fitted.layers)), None) for least in (*AHEAD, NOTHING)]),
        "foreseen": fastest([(listed(p, 1), foresight_of(*chances, fitted.layers, p)) for p in AHEAD]),
    }


def contenders(fitted: Plan, usual: Plan, cluster: Cluster, fit: Trace, trace: Trace) -> dict[str, Plan]:
    """Plans for the step of ``usual``, which is of ``trace``; ``fitted`` was decided on another one, ``fit``."""
    assert fitted.offload is not None
    once = {"places": tuple(min(p, 1) for p in fitted.offload.places), "foresight": None}
    one = fitted.offload.model_copy(update=once)
    decided = {
        "copying": (on_demand(fitted.layers, fitted.offload.places, by_need=False), one),
        "by need": (on_demand(fitted.layers, fitted.offload.places, by_need=True), one),
        **reading_ahead(fitted, cluster, fit),
        "offload": (list(fitted.layers), fitted.offload),
    }
    plans = {}
    for name, (layers, offload) in decided.items():
        same = {field: getattr(fitted, field) for field in ("degrees", "sequences", "tokens")}
        plan = usual.model_copy(update=same | {"layers": tuple(layers), "offload": offload, "placements": ()})
        limits = [device.memory_bytes for device in plan.devices]
        predicted = Step.of(plan, cluster, trace).predict(layers, plan.stored_layers, limits)
        assert all(device.total <= device.limit for device in predicted.memory), name
        plans[name] = plan.model_copy(update={"predicted": predicted})
    return plans


def rows(workload: str, plans: dict[str, Plan], reports: dict[str, list[Report]]) -> list[str]:
    first = median(report.step.measured for report in reports["copying"])
    lines = []
    for name, found in reports.items():
        taken, reads = median(report.step.measured for report in found), found[0].reads
        assert reads is not None
        spread = max(report.step.spread for report in found)
        guess = plans[name].predicted.step_seconds
        lines.append(
            f"| {workload} | {name} | {guess * 1e3:.1f} | {taken * 1e3:.1f} | {spread:.0%} | {first / taken:.2f} | "
            f"{reads.needed:.1f} | {reads.listed:.1f} | {reads.ahead:.1f} | {reads.vain:.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=HERE.parent / "examples/tiny_moe/trace.npz")
    parser.add_argument("--folder", type=Path, help="on a disk; by default the system's temporary folder")
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", default="decode:4@128,decode:16@128,prefill:256")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "offload.md")
    args = parser.parse_args()
    whole = Trace.read(args.trace)
    fit, rest = whole.part(0, 0.5), whole.part(0.5, 1)
    model, lines = model_of(whole), []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = str(rest.write(Path(folder) / "rest.npz"))
        launcher = LocalLauncher(2)
        console.print("profiling")
        cluster = profile(launcher, [model], budget_seconds=60, accept_noise=True, offload=Path(folder))
        for text in args.workloads.split(","):
            workload = Workload.from_text(text)
            limit = limit_of(model, cluster, workload, fit, args.share)
            fitted = solve(model, cluster, workload, fit, strategy="offload", memory_bytes=limit)
            usual = solve(
                model, cluster, workload, rest, trace_path=path, strategy="offload", memory_bytes=limit, time_limit=5.0
            )
            plans = contenders(fitted, usual, cluster, fit, rest)
            reports: dict[str, list[Report]] = {name: [] for name in plans}
            for i in range(args.rounds):
                for name, plan in plans.items():
                    report = run(plan, launcher, tolerance=10.0, step_budget=10.0, check_budget=10.0)
                    assert report.check is not None
                    assert report.check.passed, report.check
                    reports[name].append(report)
                    console.print(f"{text}, round {i + 1}, {name}: {report.step.measured * 1e3:.1f} ms, {report.reads}")
            lines += rows(text, plans, reports)
    each = model.computed_expert_bytes(0, "f32") / 2**20
    text = (
        f"# Experts beyond memory, read from a disk\n\n{processor()}, Linux {platform.release()}; two local ranks, "
        f"direct reads of the machine's disk; `python -m moeplan.benchmarks.offload --share {args.share:g} --rounds "
        f"{args.rounds}`. {whole.layers} layers of {whole.num_experts} experts of {each:.1f} MiB, top-{whole.top_k}, "
        f"f32; memory for {args.share:.0%} of them. What stays is decided on the first half of `{named(args.trace)}`, "
        "steps are of the second. Times are medians over rounds, the spread is the largest of a round; experts that "
        "a step needed from the disk, that were to be read ahead, that were both, and that were read in vain. Every "
        "output equals the reference.\n\n"
        "| workload | plan | predicted ms | measured ms | spread | times faster | needed | read ahead | both | vain |\n"
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    text += "\n".join(lines) + "\n"
    write_atomically(args.output, lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    main()

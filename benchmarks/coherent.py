"""Coherent decoding beside plain ep over a slow link, on a recorded trace with real affinity between layers.

    python -m moeplan.benchmarks.coherent [--trace FILE] [--top-k 1] [--kv-heads 2] [--gbit 0.02] [--output FILE.md]

Two hosts of one device each, emulated (Linux, root). The model has the trace's layers and experts, of which a token
uses its first ``--top-k``. Both plans are solved for the first half of the trace, placements included, within a tenth
more memory than single copies of all experts need (ep would else hold all of them everywhere and move nothing). They
run on decoding steps of the second half, in turn for several rounds. p*: part of the second half's tokens whose first
expert is not on the device of the layer before's, under coherent's placement.
"""

import argparse
import platform
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console

from moeplan import Cluster, Model, Plan, Report, Trace, Workload
from moeplan.benchmarks.hardware import processor
from moeplan.benchmarks.inputs import named
from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.profiler import profile
from moeplan.runtime.launch import Lab, LabLauncher, LabSpec
from moeplan.runtime.run import run
from moeplan.spec.document import write_atomically
from moeplan.spec.model import Attention, Block, Moe
from moeplan.spec.plan import LayerPlan

HERE = Path(__file__).parent
HIDDEN, FFN, HEADS, HEAD_DIM = 1024, 256, 16, 64
STRATEGIES = ("ep", "coherent")
console = Console(stderr=True)


def model_of(trace: Trace, kv_heads: int) -> Model:
    attention = Attention(heads=HEADS, kv_heads=kv_heads, head_dim=HEAD_DIM)
    moe = Moe(num_experts=trace.num_experts, top_k=trace.top_k, ffn_size=FFN)
    block = Block(count=trace.layers, hidden_size=HIDDEN, attention=attention, moe=moe)
    return Model(name="coherent-bench", family="benchmark", vocab_size=256, blocks=(block,), dtype="f32")


def first_choices(path: Path, top_k: int) -> tuple[Trace, Trace]:
    """The halves of the trace with the first ``top_k`` choices of every token."""
    whole = Trace.read(path)
    ids = whole.expert_ids[:, :, :top_k]
    both = Trace.of(ids, whole.num_experts, seq_len=whole.seq_len, model=whole.model)
    return both.part(0, 0.5), both.part(0.5, 1)


def crossings(layers: tuple[LayerPlan, ...], trace: Trace) -> float:
    """p* of two devices; a copy on both never crosses."""
    held = np.array([[[e in own for e in range(trace.num_experts)] for own in plan.slots] for plan in layers])
    at = np.stack([layer[:, ids] for layer, ids in zip(held, trace.expert_ids[:, :, 0].T, strict=True)])  # [L, 2, T]
    return float((~(at[1:] & at[:-1]).any(1)).mean())


def held_out(fitted: Plan, cluster: Cluster, workload: Workload, trace: Trace, path: str) -> Plan:
    """The same decisions, predicted for a step of another trace."""
    usual = solve(fitted.model, cluster, workload, trace, trace_path=path, strategy="ep", time_limit=10.0)
    moved = usual.model_copy(update={n: getattr(fitted, n) for n in ("degrees", "sequences", "tokens", "layers")})
    step = Step.of(moved, cluster, trace)
    limits = [device.memory_bytes for device in moved.devices]
    predicted = step.predict(list(moved.layers), moved.stored_layers, limits)
    return moved.model_copy(update={"predicted": predicted})


def row(workload: str, plans: dict[str, Plan], reports: dict[str, list[Report]], trace: Trace) -> str:
    times = {name: median(r.step.measured for r in found) * 1e3 for name, found in reports.items()}
    spread = max(r.step.spread for found in reports.values() for r in found)
    guess = {name: plan.predicted.step_seconds * 1e3 for name, plan in plans.items()}
    sent = {name: sum(link.bytes for link in plan.predicted.traffic) / 1024 for name, plan in plans.items()}
    away = crossings(plans["coherent"].layers, trace)
    figures = [f"{guess[name]:.1f} | {times[name]:.1f} | {sent[name]:.0f}" for name in STRATEGIES]
    gain = f"{times['ep'] / times['coherent']:.2f} ({guess['ep'] / guess['coherent']:.2f})"
    return f"| {workload} | {away:.2f} | {' | '.join(figures)} | {gain} | {spread:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=HERE.parent / "examples/tiny_moe/trace.npz")
    parser.add_argument("--top-k", type=int, default=1)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--gbit", type=float, default=0.02)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workloads", default="decode:16@128,decode:64@128")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "coherent.md")
    args = parser.parse_args()
    fit, rest = first_choices(args.trace, args.top_k)
    model = model_of(rest, args.kv_heads)
    hosts = [{"name": name, "ranks": 1, "cpu_share": 0.7} for name in ("a", "b")]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(rest.write(Path(folder) / "rest.npz"))
        with Lab(LabSpec.model_validate({"name": "coherent", "hosts": hosts, "uplink_gbit": args.gbit})) as lab:
            launcher = LabLauncher(lab)
            console.print("profiling")
            cluster = profile(launcher, [model], budget_seconds=60, accept_noise=True)
            for text in args.workloads.split(","):
                workload = Workload.from_text(text)
                single = solve(model, cluster, workload, fit, strategy="coherent", even=True)
                limit = int(1.1 * max(device.total for device in single.predicted.memory))
                plans = {}
                for name in STRATEGIES:
                    fitted = solve(model, cluster, workload, fit, strategy=name, memory_bytes=limit)
                    plans[name] = held_out(fitted, cluster, workload, rest, path)
                    console.print(
                        name, [p.method for p in fitted.placements], plans[name].parts_frame().sum().to_dict()
                    )
                reports: dict[str, list[Report]] = {name: [] for name in STRATEGIES}
                for i in range(args.rounds):
                    for name in STRATEGIES:
                        report = run(plans[name], launcher, tolerance=10.0, step_budget=8.0, check_budget=10.0)
                        assert report.check is not None
                        assert report.check.passed, report.check
                        reports[name].append(report)
                        console.print(f"{text}, round {i + 1}, {name}: {report.step.measured * 1e3:.1f} ms")
                lines.append(row(text, plans, reports, rest))
    options = f"--top-k {args.top_k} --kv-heads {args.kv_heads} --gbit {args.gbit:g} --rounds {args.rounds}"
    preface = (
        f"# Coherent decoding beside ep over a slow link\n\n{processor()}, Linux {platform.release()}; two emulated "
        f"hosts of one device, {args.gbit:g} Gbit/s; `python -m moeplan.benchmarks.coherent {options}`. Hidden "
        f"{HIDDEN}, keys and values {2 * args.kv_heads * HEAD_DIM}, {rest.layers} layers of {rest.num_experts} "
        f"experts, top-{args.top_k}, f32. Plans and placements are from the first half of `{named(args.trace)}`, steps "
        "from the second, memory for a tenth more than single copies. Times are medians over rounds, the spread is the "
        "largest of a round. Every output equals the reference.\n\n"
    )
    head = (
        "| workload | p* | ep: predicted ms | measured ms | KiB sent | coherent: predicted ms | measured ms | KiB sent "
        "| ep / coherent (predicted) | spread |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    text = preface + head + "\n".join(lines) + "\n"
    write_atomically(args.output, lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    main()

"""Advice on recorded routing: the gain said from one part of a trace, and the gain found on the next.

    python -m moeplan.benchmarks.advise_traces TRACE.npz ... [--tables FOLDER]

EPLB's placements are fitted on the first 40 % of a trace. The advice is given once with the next 30 %, and once with
the last 30 % in their place, which the first has not seen: its middle is what was found. Traces of docs/inputs.md,
H200, TensorRT-LLM's tables, 8 devices.

What is printed is also written, with the command, to benchmarks/results/advise-traces.md.
"""

import argparse
from datetime import date
from pathlib import Path

import numpy as np

from moeplan.benchmarks.placement import MODELS
from moeplan.planner.advise.advise import Question, advise
from moeplan.planner.advise.imbalance import Phase
from moeplan.planner.advise.measured import kernel_table
from moeplan.planner.advise.timing import TableTimer
from moeplan.planner.budget import Budget
from moeplan.planner.place.fleet import even_fleet
from moeplan.profiler.silicon.audited import open_tables
from moeplan.spec.advice import Advice
from moeplan.spec.catalogue import load_model
from moeplan.spec.tabled import Tables
from moeplan.spec.trace import Trace

ROOT = Path(__file__).parents[1]
SYSTEM, ENGINE, DEVICES = "h200_sxm", "trtllm", 8
TOKENS: dict[Phase, int] = {"prefill": 2048, "decode": 256}
FIT, NEXT = 0.4, 0.7  # of a trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--tables", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "advise-traces.md")
    args = parser.parse_args()
    tables = open_tables(args.tables)
    names = " ".join(f"{path.parent.name}/{path.name}" for path in args.traces)
    lines = [
        "# Advice on recorded routing\n",
        f"{date.today()}. Command: `python -m moeplan.benchmarks.advise_traces {names}`. No time is measured here: "
        f"tables of {ENGINE} on {SYSTEM}, {DEVICES} devices.\n",
        "*said*: gain of the experts' time with its 90 % interval, from one part of the trace; *found*: on the next.\n",
        "| trace | phase, tokens | placement | slots | hottest before | after | said | found | inside |",
        "|---|---|---|--:|--:|--:|--:|--:|---|",
    ]
    inside = []
    for path in args.traces:
        trace = Trace.read(path)
        said, found = (answer(part, tables, fitted) for part, fitted in parts(trace))
        rows, hits = compared(f"{path.parent.name}/{path.stem}", said, found)
        lines += rows
        inside += hits
        print("\n".join(rows))
    lines.append(f"\n{sum(inside)} of {len(inside)} gains that were found are in the interval that was said.")
    text = "\n".join(lines) + "\n"
    print(lines[-1])
    args.output.write_text(text)


def parts(trace: Trace) -> list[tuple[Trace, float]]:
    """The fitted part followed by the next, and followed by the last; and the share of tokens that is fitted."""
    first = trace.part(0, FIT)
    both = [joined(first, trace.part(low, high)) for low, high in ((FIT, NEXT), (NEXT, 1.0))]
    return [(part, first.tokens / part.tokens) for part in both]


def joined(a: Trace, b: Trace) -> Trace:
    return Trace.of(
        np.concatenate([a.expert_ids, b.expert_ids]),
        a.num_experts,
        seq_len=np.concatenate([a.seq_len, b.seq_len]),
    )


def answer(trace: Trace, tables: Tables, fitted: float) -> Advice:
    model = load_model(MODELS[trace.layers, trace.num_experts])
    timer = TableTimer(kernel_table(tables, SYSTEM, ENGINE, model), DEVICES)
    experts = trace.num_experts
    question = Question(
        even_fleet(DEVICES, 1, experts, True),
        (experts, experts + DEVICES),
        TOKENS,
        tables.system(SYSTEM).intra_node_bytes_per_second,
        fit=(0.0, fitted),
        makers=("eplb",),  # whose placements take no time, and are the same on a busy machine
    )
    return advise(trace, model, timer, question, device=SYSTEM, engine=ENGINE, budget=Budget.of(60))


def compared(name: str, said: Advice, found: Advice) -> tuple[list[str], list[bool]]:
    rows, hits = [], []
    for i, phase in enumerate(said.phases):
        for first, second in zip(said.options, found.options, strict=True):
            a, b = first.phases[i], second.phases[i]
            hits.append(a.gain.low <= b.gain.middle <= a.gain.high)
            rows.append(
                f"| {name} | {phase}, {a.tokens} | {first.placement} | {first.slots} | {a.hottest_before:.2f} | "
                f"{a.hottest:.2f} | {a.gain.middle:+.1%} ({a.gain.low:+.1%} to {a.gain.high:+.1%}) | "
                f"{b.gain.middle:+.1%} | {'yes' if hits[-1] else 'no'} |"
            )
    return rows, hits


if __name__ == "__main__":
    main()

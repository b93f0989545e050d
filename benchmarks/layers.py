"""One mixture-of-experts layer on several ranks: moeplan's strategies beside Transformers' and DeepSpeed-MoE's.

    python -m moeplan.benchmarks.layers [--case local|link|skew|families|whole] [--output FILE.md]

local: two ranks of this machine. link: two emulated hosts, 1 Gbit/s between them (Linux and root), without
``gathered``, whose weights would take seconds. skew: MoEShard's comparison, 128 experts of Switch-Base (top-1, plain
FFN) for batches of 10 and 250 sequences of 25 tokens. families: the experts modules of three families of Transformers
on two ranks under ``moeplan.transformers.apply_plan``, beside Transformers' own expert parallelism; whole: the same
with a copy of every expert on every rank. All methods get the same routing, share weights, and take turns in one
process group; outputs equal a single process's before they are timed. A call's time is that of its slowest rank; the
table has medians and spreads ((90th - 10th percentile) over median) of the rounds. Skewed: a tenth of the experts get
60 % of the choices, which makes DeepSpeed-MoE, dropless and so padded to its fullest expert, compute six times the
rows; the paper's own router is not published. Transformers' ``all_reduce`` wants the same batch on every rank and
gets it: its attention would compute everything twice.

DeepSpeed is no dependency; it is measured where it is installed, in an environment beside the project's:
``DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install --no-build-isolation deepspeed==0.19.8``
"""

import argparse
import platform
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from scipy.stats import gmean

from moeplan.benchmarks.hardware import processor
from moeplan.benchmarks.layers_methods import OURS, ROUTINGS, Shape
from moeplan.runtime.launch import Lab, LabLauncher, LabSpec, Launcher, LocalLauncher
from moeplan.spec.document import write_atomically

HERE = Path(__file__).parent
ENTRY = "moeplan.benchmarks.layers_measure:measure"
console = Console(stderr=True)

SHAPES = {"16 of 1408, top-2": Shape(16, 2, 1024, 1408), "64 of 512, top-6": Shape(64, 6, 1024, 512)}
SWITCH = {"128 of 3072, top-1": Shape(128, 1, 768, 3072, matrices=1)}
FAMILIES = {
    "mixtral, 8 of 3584, top-2": Shape(8, 2, 1024, 3584),
    "qwen3_moe, 64 of 768, top-8": Shape(64, 8, 1024, 768, family="qwen3_moe"),
    "deepseek_v3, 32 of 1024, top-6": Shape(32, 6, 1024, 1024, family="deepseek_v3"),
}
PARALLEL = ("apply_plan ep", "apply_plan sharded", "Transformers all_to_all", "Transformers all_reduce")
LENGTH = 25  # tokens of a sequence
LINK = {"name": "layers", "hosts": [{"name": n, "ranks": 1, "cpu_share": 0.9} for n in "ab"], "uplink_gbit": 1.0}


@dataclass(frozen=True)
class Case:
    """``lab``: of the lab; None: local ranks."""

    shapes: dict[str, Shape]
    tokens: tuple[int, ...]
    dtypes: tuple[str, ...] = ("f32", "bf16")
    routings: tuple[str, ...] = ROUTINGS
    methods: tuple[str, ...] = ("ep", "sharded", "gathered", *PARALLEL[2:], "DeepSpeed-MoE")
    lab: dict[str, Any] | None = None


CASES = {
    "local": Case(SHAPES, (8, 64, 512, 2048)),
    "link": Case(SHAPES, (8, 64, 512, 2048), methods=("ep", "sharded", *PARALLEL[2:], "DeepSpeed-MoE"), lab=LINK),
    "skew": Case(SWITCH, (10 * LENGTH, 250 * LENGTH), ("f32",), methods=("ep", "sharded", "DeepSpeed-MoE")),
    "families": Case(FAMILIES, (1, 8, 64, 512, 2048), routings=("skewed",), methods=PARALLEL),
    "whole": Case(
        FAMILIES, (1, 8, 64, 512, 2048), routings=("skewed",), methods=("apply_plan whole", "Transformers whole")
    ),
}


def measured(case: Case, seconds: float) -> list[dict[str, Any]]:
    """What every rank found, in rank order."""
    job = {
        "shapes": {name: asdict(shape) for name, shape in case.shapes.items()},
        "dtypes": case.dtypes,
        "tokens": case.tokens,
        "routings": case.routings,
        "methods": case.methods,
        "seconds": seconds,
    }
    with Lab(LabSpec.model_validate(case.lab)) if case.lab else nullcontext() as lab:
        launcher: Launcher = LabLauncher(lab) if lab else LocalLauncher(2, threads=1)
        show = lambda event: console.print(event["what"], style="dim")  # noqa: E731
        return launcher.run(ENTRY, job, timeout=300, on_event=show)


def table(results: list[dict[str, Any]], methods: Sequence[str]) -> str:
    """Milliseconds of each row, ratios to the first method, and geometric means of these."""
    usual = methods[0]
    lines = [f"| shape | dtype | tokens | routing | {' | '.join(methods)} | fastest other / {usual} | / best of ours |"]
    lines.append(f"|---|---|--:|---|{'--:|' * (len(methods) + 2)}")
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for ranks in zip(*(result["rows"] for result in results), strict=True):
        slowest = {name: np.max([row["seconds"][name] for row in ranks], axis=0) for name in ranks[0]["seconds"]}
        middle = {name: float(np.median(times)) for name, times in slowest.items()}
        row, cells = ranks[0], []
        for name in methods:
            low, high = np.percentile(slowest[name], (10, 90))
            cells.append(f"{middle[name] * 1e3:.2f} ±{(high - low) / middle[name]:.0%}")
        fastest = min(middle[name] for name in methods if name not in OURS)
        best = min(middle[name] for name in methods if name in OURS)
        for name, (other, taken) in product(methods, ((f"`{usual}`", middle[usual]), ("the fastest of ours", best))):
            ratios.setdefault((row["dtype"], other, name), []).append(middle[name] / taken)
        cells += [f"{fastest / middle[usual]:.2f}", f"{fastest / best:.2f}"]
        lines.append(f"| {row['shape']} | {row['dtype']} | {row['tokens']} | {row['routing']} | {' | '.join(cells)} |")
    lines += ["", "Geometric means of the ratios:", "", f"| dtype | time over that of | {' | '.join(methods)} |"]
    lines.append(f"|---|---|{'--:|' * len(methods)}")
    for dtype, other in dict.fromkeys((dtype, other) for dtype, other, _ in ratios):
        lines.append(f"| {dtype} | {other} | {' | '.join(f'{gmean(ratios[dtype, other, n]):.2f}' for n in methods)} |")
    return "\n".join(lines)


def page(name: str, case: Case, results: list[dict[str, Any]], command: str) -> str:
    """The whole result."""
    missing = results[0]["missing"]
    methods = [method for method in case.methods if method not in missing]
    errors = {method: max(result["errors"][method] for result in results) for method in methods}
    where = "two emulated hosts of one rank, 1 Gbit/s between them" if case.lab else "two ranks of this machine"
    text = (
        f"# One layer, {name}\n\n{processor()}, Linux {platform.release()}; {where}, one thread each; `{command}`. "
        "Milliseconds: median over interleaved rounds ± (90th - 10th percentile) / median; tokens of all ranks. Every "
        f"output equals one process's (relative error at most {max(errors.values()):.1e}).\n\n"
    )
    text += table(results, methods) + "\n"
    return text + "".join(f"\n{method}: {why}.\n" for method, why in missing.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), default="local")
    parser.add_argument("--seconds", type=float, default=6.0, help="for the calls of a row; three rounds at least")
    parser.add_argument("--tokens", help="comma-separated, other than the case's")
    parser.add_argument("--dtypes", help="comma-separated, other than the case's")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/layers-CASE.md")
    args = parser.parse_args()
    case = CASES[args.case]
    if args.tokens:
        case = replace(case, tokens=tuple(map(int, args.tokens.split(","))))
    if args.dtypes:
        case = replace(case, dtypes=tuple(args.dtypes.split(",")))
    results = measured(case, args.seconds)
    command = shlex.join(["python", "-m", "moeplan.benchmarks.layers", *sys.argv[1:]])
    text = page(args.case, case, results, command)
    output = args.output or HERE / "results" / f"layers-{args.case}.md"
    write_atomically(output, lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    main()

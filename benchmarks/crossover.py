"""Which strategy is fastest, over tokens and link rates: as predicted for every cell, and as measured in some.

    python -m moeplan.benchmarks.crossover [--case sharded|map] [--measure few|all|none] [--output FILE.md]

sharded: MoEShard's question. Two emulated hosts of one device, 128 experts, top-1, of which a tenth get 60 % of the
tokens: from how many tokens on is ``sharded`` faster than ``ep``, and does the planner find it? map: three link rates
by five numbers of tokens. In both, devices have memory for what ``gathered`` needs (see ``settings_lab``). One profile
for each link rate; what is in the folder is not measured again. Linux and root.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from moeplan import Trace
from moeplan.benchmarks.hardware import processor
from moeplan.benchmarks.layers_methods import HOT_EXPERTS, HOT_SHARE
from moeplan.benchmarks.settings_lab import (
    CHOSEN,
    LabShape,
    Say,
    Setting,
    entry,
    measured,
    model_of,
    plans_of,
    profiled,
    write,
)
from moeplan.runtime.launch import Lab, LabLauncher
from moeplan.spec.document import write_atomically

HERE = Path(__file__).parent
COMPARED = ("ep", "sharded", "gathered")
console = Console(stderr=True)


@dataclass(frozen=True)
class Case:
    """Cells: every link rate by every number of tokens; ``few``: those that are measured by default."""

    model: str
    rates: tuple[float, ...]
    tokens: tuple[int, ...]
    few: tuple[tuple[float, int], ...]
    skewed: bool = False

    def setting(self, rate: float, tokens: int) -> Setting:
        return Setting(LabShape((0.9, 0.9), 1, rate), self.model, f"prefill:{tokens}@{min(tokens, 16)}")


TOKENS = (16, 64, 256, 1024, 4096)
CASES = {
    "sharded": Case("experts128", (0.5, 10.0), TOKENS, ((0.5, 16), (0.5, 1024), (10.0, 16), (10.0, 1024)), skewed=True),
    "map": Case("lab-moe", (0.1, 1.0, 10.0), TOKENS, ((0.1, 64), (0.1, 1024), (1.0, 256), (10.0, 16), (10.0, 4096))),
}


def skewed_counts(model: str, seed: int = 0) -> Trace:
    """A tenth of each layer's experts are chosen ``HOT_SHARE`` of the time."""
    found, rng = model_of(model), np.random.default_rng(seed)
    moe = found.moe_block().moe
    assert moe is not None
    hot = max(1, round(HOT_EXPERTS * moe.num_experts))
    counts = np.full((len(found.moe_layers), moe.num_experts), (1 - HOT_SHARE) / (moe.num_experts - hot))
    for row in counts:
        row[rng.permutation(moe.num_experts)[:hot]] = HOT_SHARE / hot
    return Trace.of_counts(1e6 * counts, model=model)


def cells(case: Case, which: str, folder: Path, minutes: float, say: Say) -> dict[tuple[float, int], dict[str, Any]]:
    """What is known of every cell, as ``settings_lab.measured`` says; only predictions where it was not run."""
    end = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    trace, path = None, ""
    if case.skewed:
        path = str((folder / f"{case.model}-skewed.npz").absolute())
        trace = skewed_counts(case.model)
        trace.write(path)
    found: dict[tuple[float, int], dict[str, Any]] = {}
    for rate in case.rates:
        with Lab(case.setting(rate, 1).lab.spec()) as lab:
            launcher = LabLauncher(lab)
            cluster = profiled(case.setting(rate, 1).lab, [case.model], launcher, folder, say)
            for tokens in case.tokens:
                setting = case.setting(rate, tokens)
                plans = plans_of(setting, cluster, trace, path)
                wanted = which == "all" or (which == "few" and (rate, tokens) in case.few)
                if wanted and not setting.file(folder).exists() and time.monotonic() < end:
                    write(setting.file(folder), measured(setting, plans, launcher, 2, say))
                if setting.file(folder).exists():
                    found[rate, tokens] = json.loads(setting.file(folder).read_text())["plans"]
                else:
                    found[rate, tokens] = {name: entry(plan) for name, plan in plans.items()}
    return found


def fastest(plans: dict[str, Any], key: str) -> str:
    """Of the strategies that are compared; "" where none was run."""

    def value(name: str) -> float:
        seconds = plans[name].get(key) or []
        return seconds if isinstance(seconds, float) else median(seconds) if seconds else float("inf")

    best = min(COMPARED, key=value)
    return best if value(best) < float("inf") else ""


def picture(case: Case, found: dict[tuple[float, int], dict[str, Any]]) -> str:
    """The predicted winner of every cell, and the measured one behind a stroke."""
    lines = [f"| Gbit/s | {' | '.join(f'{tokens} tokens' for tokens in case.tokens)} |"]
    lines.append(f"|--:|{'---|' * len(case.tokens)}")
    for rate in case.rates:
        names = []
        for tokens in case.tokens:
            plans = found[rate, tokens]
            predicted, taken = fastest(plans, "predicted"), fastest(plans, "measured")
            names.append(
                f"{predicted} / {'**' + taken + '**' if taken != predicted else taken}" if taken else predicted
            )
        lines.append(f"| {rate:g} | {' | '.join(names)} |")
    return "\n".join(lines)


def details(case: Case, found: dict[tuple[float, int], dict[str, Any]]) -> str:
    """Predicted and measured milliseconds of every cell."""
    names = (*COMPARED, CHOSEN)
    lines = [f"| Gbit/s | tokens | {' | '.join(names)} |", f"|--:|--:|{'--:|' * len(names)}"]
    for (rate, tokens), plans in found.items():
        figures = []
        for name in names:
            taken = plans[name].get("measured")
            figures.append(f"{plans[name]['predicted'] * 1e3:.0f}" + (f" / {median(taken) * 1e3:.0f}" if taken else ""))
        lines.append(f"| {rate:g} | {tokens} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), default="map")
    parser.add_argument("--measure", choices=["few", "all", "none"], default="few")
    parser.add_argument("--minutes", type=float, default=30.0, help="after which nothing more is measured")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "build" / "crossover")
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/crossover-CASE.md")
    args = parser.parse_args(arguments)
    case = CASES[args.case]
    say = lambda text: console.print(text, style="dim")  # noqa: E731
    found = cells(case, args.measure, args.folder, args.minutes, say)
    routing = ", a tenth of the experts with 60 % of the tokens" if case.skewed else ""
    command = shlex.join(["python", "-m", "moeplan.benchmarks.crossover", *sys.argv[1:]])
    text = (
        f"# The fastest strategy over tokens and link rates: {args.case}\n\n{processor()}, Linux {platform.release()}; "
        f"`{command}`. Two emulated hosts of one device of 0.9 "
        f"cores; {case.model}, prompts of 16 tokens{routing}. Predicted / measured, of {', '.join(COMPARED)} in every "
        f"layer; bold: not as predicted.\n\n{picture(case, found)}\n\nMilliseconds of a step, predicted / measured; "
        f"chosen: by `solve`, layer by layer.\n\n{details(case, found)}\n"
    )
    output = args.output or HERE / "results" / f"crossover-{args.case}.md"
    write_atomically(output, lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    main()

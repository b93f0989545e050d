"""Lab settings: is what ``solve`` chooses the fastest, and does a step take as long as it says?

    python -m moeplan.benchmarks.settings --seed 7 [--minutes 60] [--rounds 2] [--folder build/settings]

Twelve settings of this file and twelve drawn by ``--seed``: shape of the model x tokens x link rate x processor shares
x phase, in the lab (Linux and root). For each, from one profile of its lab: a plan of every strategy alone and the free
choice, run in turn for several rounds. Nothing in the folder is measured again, so that a run may be stopped and go on
later; ``--minutes`` ends it. The table: predicted / measured ms of each, what was chosen, its measured time over that
of the fastest plan, and the error of its prediction. Strategies that are predicted to take five times the fastest
one's time are not run.
"""

import argparse
import json
import platform
import random
import shlex
import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console

from moeplan.benchmarks.hardware import processor
from moeplan.benchmarks.settings_lab import CHOSEN, LabShape, Setting, measure_settings
from moeplan.spec.document import write_atomically
from moeplan.spec.plan import IN_MEMORY

HERE = Path(__file__).parent
console = Console(stderr=True)

SLOW = LabShape((0.42, 0.42), 2, 0.1)
UNEQUAL = LabShape((0.56, 0.28), 2, 1.0)
PAIR = LabShape((0.9, 0.9), 1, 1.0)
FAST = LabShape((0.9, 0.6), 1, 10.0)
FIXED = [
    Setting(SLOW, "top8", "prefill:512"),
    Setting(SLOW, "top8", "decode:16@128"),
    Setting(SLOW, "tiny-moe", "decode:256@64"),
    Setting(UNEQUAL, "lab-moe", "prefill:512"),
    Setting(UNEQUAL, "lab-moe", "decode:16@512", tight=False),
    Setting(UNEQUAL, "tiny-moe", "prefill:1024@256"),
    Setting(PAIR, "top8", "prefill:256"),
    Setting(PAIR, "lab-moe", "decode:64@256"),
    Setting(PAIR, "tiny-moe", "decode:32@128", tight=False),
    Setting(FAST, "lab-moe", "prefill:1024"),
    Setting(FAST, "top8", "decode:64@128"),
    Setting(FAST, "tiny-moe", "prefill:4096@512"),
]
DRAWN_LABS, OF_EACH = 3, 4
SHARES = {1: (0.45, 0.6, 0.75, 0.9), 2: (0.22, 0.3, 0.38, 0.45)}  # by devices of a host
RATES = (0.05, 0.2, 0.5, 2.0, 5.0)
MODELS = ("tiny-moe", "lab-moe", "top8")
WORKLOADS = ("prefill:128", "prefill:512", "prefill:2048", "decode:8@128", "decode:32@64", "decode:128@32")


def drawn(seed: int) -> list[Setting]:
    """Twelve settings in three labs."""
    draw = random.Random(seed)
    labs: dict[LabShape, None] = {}
    while len(labs) < DRAWN_LABS:
        ranks = draw.choice((1, 2))
        labs[LabShape((draw.choice(SHARES[ranks]), draw.choice(SHARES[ranks])), ranks, draw.choice(RATES))] = None
    found: dict[Setting, None] = {}
    for i, lab in enumerate(labs):
        while len(found) < (i + 1) * OF_EACH:
            found[Setting(lab, draw.choice(MODELS), draw.choice(WORKLOADS), draw.random() < 0.7)] = None
    return list(found)


def seconds(entry: dict[str, Any]) -> float | None:
    """Measured: the median over rounds; None: not run."""
    return median(entry["measured"]) if entry["measured"] else None


def row(setting: Setting, plans: dict[str, Any]) -> tuple[str, float, list[float], float]:
    """The table's line, choice over best, errors of all plans that were run, and that of the choice."""
    times = {name: taken for name, entry in plans.items() if (taken := seconds(entry)) is not None}
    errors = {name: plans[name]["predicted"] / taken - 1 for name, taken in times.items()}
    over = times[CHOSEN] / min(times.values())
    cells = []
    for name in IN_MEMORY:
        entry = plans.get(name)
        taken = times.get(name)
        cells.append(
            "" if entry is None else f"{entry['predicted'] * 1e3:.0f} / {taken * 1e3:.0f}" if taken else "slow"
        )
    own = plans[CHOSEN]
    chosen = ", ".join(f"{count} {name}" for name, count in own["layers"].items())
    chosen += f" in {own['chunks']} chunks" if own["chunks"] > 1 else ""
    figures = f"{own['predicted'] * 1e3:.0f} / {times[CHOSEN] * 1e3:.0f} | {over:.2f} | {errors[CHOSEN]:+.0%}"
    spread = max(max(entry["spread"], default=0.0) for entry in plans.values())
    line = f"| {setting.lab} | {setting} | {' | '.join(cells)} | {chosen} | {figures} | {spread:.0%} |"
    # Plans that do the same were run once, and count once.
    judged = [error for name, error in errors.items() if "as" not in plans[name]]
    return line, over, judged, errors[CHOSEN]


def summary(name: str, rows: list[tuple[str, float, list[float], float]]) -> str:
    """Choice over best, and errors."""
    every = [abs(error) for _, _, errors, _ in rows for error in errors]
    own = [abs(error) for *_, error in rows]
    overs = [over for _, over, _, _ in rows]
    return (
        f"- {name}, {len(rows)} settings: choice over the best {mean(overs):.3f} on average, {max(overs):.2f} at "
        f"worst; error of {len(every)} plans {mean(every):.1%} on average, {max(every):.0%} at worst; of the choices "
        f"{mean(own):.1%} and {max(own):.0%}."
    )


def page(groups: dict[str, list[Setting]], folder: Path, command: str) -> str:
    """The table of all settings that were measured."""
    head = f"| lab | setting | {' | '.join(IN_MEMORY)} | chosen | of it | / best | error | spread |"
    lines = [head, f"|---|---|{'--:|' * len(IN_MEMORY)}---|{'--:|' * 4}"]
    rows: dict[str, list[tuple[str, float, list[float], float]]] = {}
    for name, settings in groups.items():
        found = [setting for setting in settings if setting.file(folder).exists()]
        rows[name] = [row(setting, json.loads(setting.file(folder).read_text())["plans"]) for setting in found]
        lines += [line for line, *_ in rows[name]]
    everything = [one for group in rows.values() for one in group]
    summaries = [summary(name, group) for name, group in [*rows.items(), ("all", everything)] if group]
    wanted = sum(map(len, groups.values()))
    return (
        f"# {len(everything)} of {wanted} lab settings\n\n{processor()}, Linux {platform.release()}; `{command}`. "
        "Predicted / measured ms of a step: the median over the rounds' medians. slow: predicted to take five times as "
        "long as the fastest, and not run; empty: not possible there. / best: measured time of the choice over that "
        "of the fastest plan. Error: predicted over measured less one. Spread: within a round (90th - 10th percentile "
        "over median), the largest. Devices have memory for what `sharded` and `gathered` need unless it says "
        "otherwise.\n\n" + "\n".join([*lines, "", *summaries, ""])
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True, help="of the twelve drawn settings")
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=HERE.parent / "build" / "settings")
    parser.add_argument("--only", choices=["fixed", "drawn"])
    parser.add_argument("--output", type=Path, default=HERE / "results" / "settings.md")
    args = parser.parse_args()
    groups = {"fixed": FIXED, f"drawn by seed {args.seed}": drawn(args.seed)}
    asked = [setting for name, group in groups.items() if name.startswith(args.only or "") for setting in group]
    say = lambda text: console.print(text, style="dim")  # noqa: E731
    measure_settings(asked, args.folder, args.rounds, say, args.minutes)
    command = shlex.join(["python", "-m", "moeplan.benchmarks.settings", *sys.argv[1:]])
    text = page(groups, args.folder, command)
    write_atomically(args.output, lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    main()

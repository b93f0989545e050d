"""Does EPLB pay: the predicted sign beside TensorRT-LLM's measured pairs, with and without it.

    python -m moeplan.benchmarks.advise [--tables FOLDER] [--draws 32]

The tables (extra `silicon`) hold for six types of GPU the time of the hottest device's experts of DeepSeek-V3 and of
its kin at 1 to 16,384 tokens on 2 to 256 devices, under power laws, as they are and balanced by EPLB in as many slots
as experts and in 288: pairs. A pair is predicted from neither of its two times:

- loads are drawn by the rule that the table names (`benchmarks/power_law.py`);
- the time of a load is read from *even* rows of another table (`moe`, the same engine and GPU) by
  `planner/advise/kernel.py`;
- both measured times are one draw each, so that the 90 % interval is of two independent draws and of the noise of rows
  and of reading. How large that noise is was taken from H100 alone (`ROW_NOISE`, `timing.MODEL_NOISE`); the other types
  are judged with it.

What is printed is also written, with the command, to benchmarks/results/advise.md.
"""

import argparse
from datetime import date
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from moeplan.benchmarks.power_law import by_number, power_law, under_eplb
from moeplan.planner.advise.kernel import KernelTable
from moeplan.planner.advise.measured import EVEN
from moeplan.planner.advise.timing import MODEL_NOISE
from moeplan.profiler.silicon.audited import open_tables
from moeplan.spec.errors import MoeplanError
from moeplan.spec.tabled import Tables

ROOT = Path(__file__).parents[1]
ENGINE, FITTED = "trtllm", "h100_sxm"
SHAPE = ["dtype", "hidden", "ffn", "experts", "top_k"]
ROW_NOISE = 0.05  # of one measured row, which was timed once
SPANS = ((1, 32), (33, 512), (513, 4096), (4097, 16384))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path)
    parser.add_argument("--draws", type=int, default=32)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "advise.md")
    args = parser.parse_args()
    tables = open_tables(args.tables)
    pairs = pd.concat([pairs_of(tables, system, args.draws) for system in tables.systems()], ignore_index=True)
    text = "\n".join(report(pairs, args.draws)) + "\n"
    print(text)
    args.output.write_text(text)


def pairs_of(tables: Tables, system: str, draws: int) -> pd.DataFrame:
    """Every pair of a GPU type: what was measured, and what is predicted."""
    try:
        wide, even = (tables.table(name, system, ENGINE).frame for name in ("moe_wideep", "moe"))
    except MoeplanError:
        return pd.DataFrame()
    if "slots" not in wide:
        return pd.DataFrame()
    found = []
    for shape, rows in wide[wide.slots.notna()].groupby(SHAPE):
        kernel = even_rows(even, shape)
        if kernel is not None:
            found += [pair for setup in measured_pairs(rows) if (pair := predicted(setup, shape, kernel, draws))]
    return pd.DataFrame(found).assign(system=system) if found else pd.DataFrame()


def even_rows(even: pd.DataFrame, shape: tuple) -> KernelTable | None:
    """Even rows of this very shape, of the kernel with most of them."""
    same = (even[SHAPE] == list(shape)).all(axis=1) & (even.routing == EVEN) & (even.tp == 1)
    rows = even[same]
    if not len(rows):
        return None
    rows = rows[rows.kernel == rows.kernel.value_counts().sort_index().idxmax()]
    devices, tokens, seconds = (rows[name].to_numpy() for name in ("ep", "tokens", "seconds"))
    return KernelTable.of(devices, tokens, seconds, int(shape[3]), int(shape[4]))


def measured_pairs(rows: pd.DataFrame) -> list[dict]:
    """Off and on of the same tokens, devices and power law."""
    keys = ["routing", "ep", "slots", "tokens"]
    seconds = rows.groupby(keys).seconds.median()
    found = []
    entries: list[tuple[tuple[str, int, int, int], float]] = list(zip(seconds.index, seconds, strict=True))
    for (routing, ep, slots, tokens), on in entries:
        law = routing.removesuffix("_eplb")
        off = seconds.get((law, ep, int(rows.experts.iloc[0]), tokens))
        if law != routing and off is not None:
            exponent = float(law.rsplit("_", 1)[1])
            found.append({"exponent": exponent, "ep": ep, "slots": slots, "tokens": tokens, "off": off, "on": on})
    return found


@cache
def loads(
    tokens: int, experts: int, top_k: int, exponent: float, ep: int, slots: int | None, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hottest device of each draw; slots: under EPLB, None: by number. Seeds of the two differ, as draws did."""
    pairs = power_law(tokens, experts, top_k, exponent, draws, seed)
    return by_number(pairs, ep) if slots is None else under_eplb(pairs, ep, slots)


def predicted(setup: dict, shape: tuple, kernel: KernelTable, draws: int) -> dict | None:
    """The pair with the predicted ratio on / off: its middle and the ends of its 90 % interval, as logarithms."""
    experts, top_k = int(shape[3]), int(shape[4])
    law = (int(setup["tokens"]), experts, top_k, setup["exponent"], int(setup["ep"]))
    if setup["slots"] % setup["ep"] or experts % setup["ep"]:
        return None
    pairs, active = loads(*law, None, draws, 1)
    off = kernel.seconds(pairs, active, experts // setup["ep"])
    pairs, active = loads(*law, int(setup["slots"]), draws, 2)
    on = kernel.seconds(pairs, active, int(setup["slots"] // setup["ep"]))
    random = np.random.default_rng(0)
    ratio = np.repeat((np.log(on)[:, None] - np.log(off)[None, :]).ravel(), 4)
    reading = MODEL_NOISE * np.minimum(1.0, np.abs(ratio) / np.log(2))
    ratio = ratio + np.sqrt(2) * np.hypot(reading, ROW_NOISE) * random.standard_normal(len(ratio))
    low, middle, high = np.quantile(ratio, [0.05, 0.5, 0.95])
    return setup | {
        "low": low,
        "middle": middle,
        "high": high,
        "measured": float(np.log(setup["on"] / setup["off"])),
        "off_error": float(np.log(np.median(off) / setup["off"])),
        "on_error": float(np.log(np.median(on) / setup["on"])),
    }


def report(pairs: pd.DataFrame, draws: int) -> list[str]:
    """The tables."""
    judged = pairs[pairs.system != FITTED]
    spread = np.concatenate([pairs[pairs.system == FITTED][name] for name in ("off_error", "on_error")])
    return [
        "# Advise: does EPLB pay?\n",
        f"{date.today()}. Command: `python -m moeplan.benchmarks.advise --draws {draws}`. No time is measured here: "
        f"aiconfigurator-core's tables, {ENGINE}.\n",
        f"{len(pairs)} measured pairs of {pairs.system.nunique()} GPU types. *pays*: EPLB was measured faster. "
        "*decided*: the 90 % interval of the predicted ratio does not contain 1. *right*: of the decided ones, those "
        "whose measured sign is the predicted one. *all right*: the sign of the middle value, decided or not. "
        "*inside*: the measured ratio is in the interval.\n",
        *table("GPU", pairs, pairs.system),
        f"\nAll but {FITTED}, from which the noise of reading was taken: {sentence(judged)}\n",
        f"On {FITTED} the middle prediction of single times has a spread of {robust(spread):.1%} (logarithms, by the "
        "median; it holds the spread of draws, too).\n",
        "## What following it costs\n",
        "Mean over pairs of the measured time over the better of both. *as advised*: EPLB only where the whole "
        "interval says that it pays.\n",
        *costs(judged),
        "## By tokens of a step\n",
        *table("tokens", judged, spans(judged)),
        "\n## By devices\n",
        *table("devices", judged, judged.ep),
        "\n## By slots and power law\n",
        *table("slots, exponent", judged, judged.slots.astype(int).astype(str) + ", " + judged.exponent.astype(str)),
    ]


def costs(pairs: pd.DataFrame) -> list[str]:
    """Always off, always on, as advised, over the better of both: in time, and in the share of wrong uses."""
    advised = pairs.high < 0
    better = np.minimum(pairs.on, pairs.off)
    lines = ["| rule | time over the better of both | uses EPLB | where it was slower |", "|---|--:|--:|--:|"]
    for name, use in (("never", advised & False), ("always", advised | True), ("as advised", advised)):
        # Every pair counts alike: long ones would decide the sum.
        over = float((np.where(use, pairs.on, pairs.off) / better).mean() - 1)
        wrong = int((use & (pairs.measured > 0)).sum())
        lines.append(f"| {name} | +{over:.1%} | {use.mean():.1%} | {wrong} of {int((pairs.measured > 0).sum())} |")
    return [*lines, ""]


def spans(pairs: pd.DataFrame) -> pd.Series:
    return pd.Series(
        [next(f"{a} to {b}" for a, b in SPANS if a <= tokens <= b) for tokens in pairs.tokens], index=pairs.index
    )


def table(name: str, pairs: pd.DataFrame, by: pd.Series) -> list[str]:
    lines = [
        f"| {name} | pairs | pays | decided | right | all right | inside | ratio off by, median |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    groups = [(str(key), group) for key, group in pairs.groupby(by, sort=False)]
    for key, group in [*groups, ("all", pairs)]:
        lines.append(f"| {key} | {len(group)} | " + " | ".join(cells(group)) + " |")
    return lines


def cells(pairs: pd.DataFrame) -> list[str]:
    decided, right = decided_right(pairs)
    inside = (pairs.measured >= pairs.low) & (pairs.measured <= pairs.high)
    shares = [
        (pairs.measured < 0).mean(),
        decided.mean(),
        right[decided].mean() if decided.any() else np.nan,
        right.mean(),
        inside.mean(),
    ]
    off = float(np.expm1((pairs.middle - pairs.measured).abs().median()))
    return ["" if np.isnan(share) else f"{share:.1%}" for share in shares] + [f"{off:.1%}"]


def decided_right(pairs: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Which pairs are decided, and whose middle has the measured sign."""
    decided = (pairs.low > 0) | (pairs.high < 0)
    return decided, (pairs.middle < 0) == (pairs.measured < 0)


def sentence(pairs: pd.DataFrame) -> str:
    decided, right = decided_right(pairs)
    signs = ", ".join(
        f"{int(side.sum())} that say {name}, {right[side].mean():.1%} of them right"
        for name, side in (("yes", decided & (pairs.middle < 0)), ("no", decided & (pairs.middle > 0)))
        if side.any()
    )
    return (
        f"of {len(pairs)} pairs {decided.mean():.1%} are decided, and of these {right[decided].mean():.1%} have the "
        f"right sign ({signs}); EPLB was faster in {(pairs.measured < 0).mean():.1%} of all pairs and in "
        f"{(pairs[decided].measured < 0).mean():.1%} of the decided ones."
    )


def robust(values: np.ndarray) -> float:
    """Standard deviation by the median."""
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


if __name__ == "__main__":
    main()

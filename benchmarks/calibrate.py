"""Calibration on published measurements: predictions corrected by one to four of them, judged on the rest.

    python -m moeplan.benchmarks.calibrate ROWS.csv [--draws 20]

ROWS.csv: a row per measured served configuration, with columns system, backend, model_path (of one setup), isl, osl,
conc, silicon_ttft_ms, silicon_tpot_ms (measured), tables_ttft, tables_tpot (predicted, milliseconds). From every setup
with enough rows as many points as the table says are drawn by seed; the factors that they give correct the other rows
of the same setup. Error: mean over setups and draws of |predicted / measured - 1|, and of its median.

What is printed is also written, with the command, to benchmarks/results/calibrate.md.
"""

import argparse
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd

from moeplan.planner.calibrate.fit import Factors, Pairs, Prior, fit

ROOT = Path(__file__).parents[1]
SETUP = ["model_path", "system", "backend"]
ENOUGH = 10  # rows of a setup
POINTS = (1, 2, 3, 4)
TIMES = {"TPOT": ("tables_tpot", "silicon_tpot_ms"), "TTFT": ("tables_ttft", "silicon_ttft_ms")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--draws", type=int, default=20, help="of points from each setup")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "calibrate.md")
    args = parser.parse_args()
    rows = pd.read_csv(args.rows)
    rows = rows[rows[[name for pair in TIMES.values() for name in pair]].notna().all(axis=1)]
    setups = {key: group for key, group in rows.groupby(SETUP) if len(group) >= ENOUGH}
    lines = [
        "# Calibration\n",
        f"{date.today()}. Command: `python -m moeplan.benchmarks.calibrate {args.rows.name} --draws {args.draws} "
        f"--seed {args.seed}`. No time is measured here.\n",
        f"{sum(map(len, setups.values()))} measured rows of {len(setups)} setups (model, GPU, engine) with {ENOUGH} "
        "rows or more. Prediction: the plain sum of measured kernel times; corrected: by points of the same setup, "
        "judged on its other rows. Errors are means over setups and draws of the mean and the median row.\n",
        *by_points(setups, args.draws, args.seed),
        "\n## By setup, two points\n",
        *by_setup(setups, args.draws, args.seed),
        "\n## How much the prior matters, two points (mean error of TPOT, TTFT)\n",
        "The prior is how far from none a correction is believed to be before anything is measured.\n",
        *by_prior(setups, args.draws, args.seed),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    args.output.write_text(text)


def by_points(setups: dict, draws: int, seed: int) -> list[str]:
    """Error before and after by the number of points."""
    lines = [
        "| points | TPOT before, mean | after | before, median | after "
        "| TTFT before, mean | after | before, median | after |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for count in POINTS:
        found = np.mean([judged(group, count, draws, seed) for group in setups.values()], axis=0)
        cells = [f"{100 * value:.1f} %" for time in found for statistic in time for value in statistic]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    return lines


def by_setup(setups: dict, draws: int, seed: int) -> list[str]:
    """Mean error of each setup."""
    lines = ["| setup | rows | TPOT before | after | TTFT before | after |", "|---|--:|--:|--:|--:|--:|"]
    better = np.zeros(2, int)
    for key, group in setups.items():
        found = judged(group, 2, draws, seed)[:, 0]
        better += found[:, 1] < found[:, 0]
        cells = " | ".join(f"{100 * value:.1f} %" for time in found for value in time)
        lines.append(f"| {', '.join(key)} | {len(group)} | {cells} |")
    lines.append(
        f"\nBetter with two points than without: TPOT in {better[0]} of {len(setups)} setups, TTFT in {better[1]}."
    )
    return lines


def by_prior(setups: dict, draws: int, seed: int) -> list[str]:
    """Mean error with a prior half and twice as wide."""
    lines = ["| prior | TPOT | TTFT |", "|---|--:|--:|"]
    for name, factor in (("half as wide", 0.5), ("as it is", 1.0), ("twice as wide", 2.0)):
        prior = Prior().times(factor)
        found = np.mean([judged(group, 2, draws, seed, prior)[:, 0, 1] for group in setups.values()], axis=0)
        lines.append(f"| {name} | {100 * found[0]:.1f} % | {100 * found[1]:.1f} % |")
    return lines


def judged(group: pd.DataFrame, count: int, draws: int, seed: int, prior: Prior | None = None) -> np.ndarray:
    """[TPOT, TTFT; mean, median; before, after] errors on the rows that were not drawn, mean over draws."""
    random = np.random.default_rng(seed)
    both = {name: tuple(group[column].to_numpy(float) for column in columns) for name, columns in TIMES.items()}
    total = np.zeros((2, 2, 2))
    for _ in range(draws):
        chosen = np.zeros(len(group), bool)
        chosen[random.choice(len(group), count, replace=False)] = True
        points = {name: (p[chosen], m[chosen]) for name, (p, m) in both.items()}
        factors = fit(Pairs(points["TPOT"], points["TTFT"]), prior)
        for i, (name, (predicted, measured)) in enumerate(both.items()):
            rest_p, rest_m = predicted[~chosen], measured[~chosen]
            total[i] += errors(rest_p, rest_m, corrected(factors, name, rest_p))
    return total / draws


def corrected(factors: Factors, name: str, predicted: np.ndarray) -> np.ndarray:
    """By the factors of this time."""
    return factors.tpot(predicted) if name == "TPOT" else factors.ttft(predicted)


def errors(predicted: np.ndarray, measured: np.ndarray, mended: np.ndarray) -> np.ndarray:
    """[mean, median; before, after]."""
    off = [np.abs(values / measured - 1) for values in (predicted, mended)]
    return np.array([[values.mean() for values in off], [np.median(values) for values in off]])


if __name__ == "__main__":
    main()

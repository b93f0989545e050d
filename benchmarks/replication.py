"""Replication beside EPLB: the published example, DeepSeek-V3's size, and growth to 4,096 devices.

    python benchmarks/replication.py [--seeds 20] [--output FILE.md]

Balance is the hottest device over the mean, 1 is perfect; its mean and worst are over the layers of all seeds. A gap is
(objective - proven bound) / objective. Loads are heavy-tailed: even seeds log-normal (sigma 1.5), odd ones Zipf
(exponent 1, a new order in every layer). Compiles first, so that seconds are those of a second call. Writes a Markdown
table with the hardware and this command, and a picture of the growth beside it.
"""

import argparse
import platform
import time
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from moeplan.benchmarks.hardware import processor
from moeplan.solvers.exact.replication import replicate_exactly
from moeplan.solvers.replication.eplb import eplb
from moeplan.solvers.replication.replicate import replicate
from moeplan.spec.document import write_atomically

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
HEADER = ("case", "rule", "method", "balance mean", "balance worst", "gap", "seconds")
EXAMPLE = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)
STEPS_PER_SLOT = 350  # changes tried per layer and slot: 100,000 at DeepSeek-V3's 288 slots
# (devices, layers, experts, slots): one spare slot per device up to 64 devices, then two slots per device. At 4,096
# devices two layers are enough to time one; the second model there has one expert per device
GROWTH = ((32, 58, 256, 288), (64, 58, 256, 320), (320, 58, 256, 640), (4096, 2, 256, 8192), (4096, 2, 4096, 8192))
Row = tuple[str, str, str, str, str, str, str]


def heavy_tailed(seed: int, layers: int, experts: int) -> np.ndarray:
    """[L, E] loads."""
    rng = np.random.default_rng(seed)
    if seed % 2 == 0:
        return rng.lognormal(0, 1.5, (layers, experts))
    return np.stack([rng.permutation(1 / np.arange(1, experts + 1)) for _ in range(layers)])


def example() -> list[Row]:
    """EPLB's published example: the hottest device's load itself, per layer, and its proven optimum."""
    equal, slots, hosts = np.ones(8), np.full(8, 2), np.arange(8) // 4
    rows: list[Row] = []
    for rule, groups, count in (("hierarchical", 4, 2), ("global", 1, 1)):
        for i, load in enumerate(EXAMPLE):
            case = f"EPLB's example, layer {i}"
            greedy = eplb(load[None], 16, groups, count, 8).hottest(load[None], equal)[0]
            rows.append((case, rule, "EPLB", f"{greedy:g}", "", "", ""))
            for shares in ("even", "optimal"):
                search = replicate(load[None], equal, slots, hosts, groups=groups, shares=shares)
                exact = replicate_exactly(load, equal, slots, hosts, groups=groups, shares=shares)
                rows.append((case, rule, f"search, {shares}", f"{search.objective:g}", "", "", f"{search.seconds:.2f}"))
                proof = f"{exact.gap:.0%}, {exact.status}"
                rows.append((case, rule, f"exact, {shares}", f"{exact.objective:g}", "", proof, f"{exact.seconds:.2f}"))
    return rows


def whole_model(seeds: int) -> list[Row]:
    """58 layers x 256 experts in 288 slots on 32 devices of 4 hosts; 8 groups in the hierarchical rule."""
    equal, slots, hosts = np.ones(32), np.full(32, 9), np.arange(32) // 8
    found: dict[tuple[str, str], list[tuple[np.ndarray, float, float]]] = {}
    for seed in range(seeds):
        load = heavy_tailed(seed, 58, 256)
        mean = load.sum(axis=1) / 32
        for rule, groups, count in (("hierarchical", 8, 4), ("global", 1, 1)):
            started = time.perf_counter()
            balance = eplb(load, 288, groups, count, 32).hottest(load, equal) / mean
            found.setdefault((rule, "EPLB"), []).append((balance, np.nan, time.perf_counter() - started))
            for shares in ("even", "optimal"):
                ours = replicate(load, equal, slots, hosts, groups=groups, shares=shares, seed=seed)
                balance = ours.assignment.hottest(load, equal) / mean
                found.setdefault((rule, f"search, {shares}"), []).append((balance, ours.gap, ours.seconds))
    rows: list[Row] = []
    for (rule, method), runs in found.items():
        balances = np.concatenate([balance for balance, _, _ in runs])
        gap = max(gap for _, gap, _ in runs)
        figures = (f"{balances.mean():.4f}", f"{balances.max():.4f}", "" if np.isnan(gap) else f"{gap:.2%} at most")
        seconds = f"{np.mean([s for _, _, s in runs]):.2f}"
        rows.append((f"58 x 256, 288 slots, 32 devices, {seeds} seeds", rule, method, *figures, seconds))
    return rows


def growth() -> tuple[list[Row], list[dict[str, Any]]]:
    """Global rule, log-normal loads (sigma 1), the same work per slot at every size."""
    rows: list[Row] = []
    points: list[dict[str, Any]] = []
    for devices, layers, experts, slots in GROWTH:
        load = np.random.default_rng(0).lognormal(0, 1, (layers, experts))
        equal, capacity, mean = np.ones(devices), np.full(devices, slots // devices), load.sum(axis=1) / devices
        case = f"{layers} x {experts}, {slots:,} slots, {devices:,} devices"
        started = time.perf_counter()
        placed = eplb(load, slots, 1, 1, devices)
        results = [("EPLB", placed.hottest(load, equal) / mean, np.nan, time.perf_counter() - started)]
        for shares in ("even", "optimal"):
            hosts = np.zeros(devices, int)
            ours = replicate(load, equal, capacity, hosts, shares=shares, steps=STEPS_PER_SLOT * slots)
            results.append((f"search, {shares}", ours.assignment.hottest(load, equal) / mean, ours.gap, ours.seconds))
        for method, balance, gap, seconds in results:
            proof = "" if np.isnan(gap) else f"{gap:.2%}"
            rows.append(
                (case, "global", method, f"{balance.mean():.4f}", f"{balance.max():.4f}", proof, f"{seconds:.2f}")
            )
            point = {"devices": devices, "experts": experts, "method": method}
            points.append(point | {"balance": balance.mean(), "seconds": seconds / layers})
    return rows, points


def picture(points: list[dict[str, Any]]) -> bytes:
    """Balance and seconds per layer over the number of devices, for the model of 256 experts."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    styles = {
        "EPLB": ("#999999", "o", "--"),
        "search, even": ("#1f77b4", "s", "-"),
        "search, optimal": ("#d95f02", "^", "-"),
    }
    for method, (color, marker, line) in styles.items():
        mine = [p for p in points if p["method"] == method and p["experts"] == 256]
        devices = [p["devices"] for p in mine]
        label = method if method == "EPLB" else f"moeplan, {method.removeprefix('search, ')} shares"
        for axes, key in ((left, "balance"), (right, "seconds")):
            axes.plot(devices, [p[key] for p in mine], color=color, marker=marker, linestyle=line, label=label)
    left.axhline(1, color="black", linewidth=0.8)
    left.set_ylabel("hottest device / mean device")
    right.set_ylabel("seconds per layer")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks([32, 64, 320, 4096], ["32", "64", "320", "4,096"])
        axes.minorticks_off()
        axes.set_xlabel("devices")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, loc="upper left")
    figure.suptitle("256 experts, log-normal loads: 9, 5, 2 and 2 slots per device", fontsize=10)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    plt.close(figure)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "replication.md")
    args = parser.parse_args()
    for shares in ("even", "optimal"):
        replicate(heavy_tailed(0, 1, 16), np.ones(2), np.full(2, 9), np.arange(2), groups=2, shares=shares, steps=10)
    grown, points = growth()
    rows = [*example(), *whole_model(args.seeds), *grown]

    shown = Table(*HEADER, title="Replication")
    for row in rows:
        shown.add_row(*row)
    Console(width=150).print(shown)
    body = "\n".join(f"| {' | '.join(row)} |" for row in (HEADER, ("---",) * 3 + ("--:",) * 4, *rows))
    machine = f"{processor()}, Linux {platform.release()}"
    image = args.output.with_suffix(".png")
    text = (
        f"# Replication beside EPLB\n\n{machine}; {date.today().isoformat()}; "
        f"`python benchmarks/replication.py --seeds {args.seeds}`. {__doc__.split(chr(10) * 2)[2].strip()}\n"
        "In the rows of EPLB's example, the figure is the hottest device's load itself.\n\n"
        f"{body}\n\n![growth]({image.name})\n"
    )
    write_atomically(args.output, lambda f: f.write(text.encode()))
    write_atomically(image, lambda f: f.write(picture(points)))


if __name__ == "__main__":
    main()

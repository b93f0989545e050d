"""Shares by batch beside shares of a plan: how hot is the hottest device of batches that the plan has not seen?

    python -m moeplan.benchmarks.by_batch [--trace FILE ...] [--devices 8] [--spare 8] [--batches 16,128,1024]

Copies are placed on the first half of a trace, with ``--spare`` slots more than experts, and judged on batches of the
second half: rows of the hottest device over the mean of all, averaged over layers and batches (1 is perfect).

    no copies          the single copies that are best balanced on the first half (EPLB's packing)
    EPLB               its copies, whose shares are even
    EPLB, by batch     the same copies, shares decided for every batch (as LPLB)
    plan               moeplan's copies, in every slot, with the shares that are best for batches of the first half
    plan, by batch     the same copies, shares decided for every batch (``solve --by-batch``)

Writes a Markdown table with the hardware and this command.
"""

import argparse
import platform
import time
from pathlib import Path

import numpy as np

from moeplan import Trace
from moeplan.benchmarks.hardware import processor
from moeplan.benchmarks.inputs import PAGE
from moeplan.solvers.replication.eplb import eplb
from moeplan.solvers.replication.replicate import replicate
from moeplan.solvers.slots import Slots
from moeplan.spec.batch_shares import BatchShares
from moeplan.spec.document import write_atomically

HERE = Path(__file__).parent
MOST, WINDOWS = 60, 16  # batches of one size that are judged, and that a plan is made for


def counts(ids: np.ndarray, experts: int) -> np.ndarray:
    """[L, E] tokens; ids: [T, L, K]."""
    return np.stack([np.bincount(ids[:, j].ravel(), minlength=experts) for j in range(ids.shape[1])]).astype(float)


def batches_of(trace: Trace, size: int, most: int) -> list[np.ndarray]:
    """[L, E] tokens of batches of so many rows, evenly over the trace."""
    whole = len(trace.expert_ids) // size
    picked = np.linspace(0, whole - 1, min(whole, most)).astype(int)
    return [counts(trace.expert_ids[i * size : (i + 1) * size], trace.num_experts) for i in picked]


def hottest(slots: Slots, batches: list[np.ndarray], by_batch: bool) -> tuple[float, float]:
    """Mean over batches [L, E] and layers of the hottest device over the mean; and the seconds of one decision."""
    devices, lists = len(slots.capacity), slots.to_lists()
    equal, ratios, spent, decided = np.ones(devices), [], 0.0, 0
    for batch in batches:
        mean = batch.sum(1) / devices
        if not by_batch:
            ratios += (slots.hottest(batch, equal) / mean).tolist()
            continue
        for (held, _), load, even in zip(lists, batch, mean, strict=True):
            shares = BatchShares(held, equal.tolist(), batch.shape[1])
            begin = time.perf_counter()
            weights = shares.weights(load)
            spent, decided = spent + time.perf_counter() - begin, decided + 1
            rows = np.zeros(devices)
            copied = set(shares.copied.tolist())
            for g, own in enumerate(held):
                rows[g] += sum(load[e] for e in own if e not in copied)
            rows += (weights * (load[shares.copied] > 0)[:, None]).sum(0)
            ratios.append(float(rows.max() / even))
    return float(np.mean(ratios)), spent / max(decided, 1)


def lines(path: Path, devices: int, spare: int, sizes: list[int]) -> list[str]:
    trace = Trace.read(path)
    fit, rest = trace.part(0, 0.5), trace.part(0.5, 1)
    experts, equal = trace.num_experts, np.ones(devices)
    load = counts(fit.expert_ids, experts)
    slots = -(-(experts + spare) // devices) * devices
    capacity = np.full(devices, slots // devices)
    single, copied = eplb(load, -(-experts // devices) * devices, 1, 1, devices), eplb(load, slots, 1, 1, devices)
    found = []
    for size in (n for n in sizes if n <= min(len(fit.expert_ids), len(rest.expert_ids))):
        windows = np.stack(batches_of(fit, size, WINDOWS))
        free = np.zeros(devices, int)
        own = replicate(windows, equal, capacity, free, shares="optimal", full=True, time_limit=60.0).assignment
        batches = batches_of(rest, size, MOST)
        values = [hottest(one, batches, False)[0] for one in (single, copied, own)]
        anew, seconds = zip(*(hottest(one, batches, True) for one in (copied, own)), strict=True)
        cells = (values[0], values[1], anew[0], values[2], anew[1])
        figures = " | ".join(f"{value:.3f}" for value in cells)
        name = f"{path.parent.name}/{path.stem}"
        found.append(f"| {name} | {experts} | {slots} | {size} | {figures} | {1e3 * max(seconds):.2f} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, nargs="+", default=[HERE.parent / "examples/tiny_moe/trace.npz"])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--spare", type=int, default=8)
    parser.add_argument("--batches", default="16,128,1024")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "by_batch.md")
    args = parser.parse_args()
    sizes = [int(size) for size in args.batches.split(",")]
    rows = [row for path in args.trace for row in lines(path, args.devices, args.spare, sizes)]
    text = (
        f"# Shares of copies, by plan and by batch\n\n{processor()}, Linux {platform.release()}; `python -m "
        f"moeplan.benchmarks.by_batch --devices {args.devices} --spare {args.spare} --batches {args.batches}`, and "
        f"`--trace` with these files {PAGE}. Hottest device over the mean, on batches of the half of the trace that "
        "nothing was decided on; ms: of one decision by batch, the longer.\n\n"
        "| trace | experts | slots | tokens | no copies | EPLB | EPLB, by batch | plan | plan, by batch | ms |\n"
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    text += "\n".join(rows) + "\n"
    write_atomically(args.output, lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    main()

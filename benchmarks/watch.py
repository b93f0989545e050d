"""The loop of `moeplan watch` beside EPLB at fixed intervals, on recorded traffic that shifts, drifts or stays.

    python -m moeplan.benchmarks.watch [FIRST.npz SECOND.npz ...] [--devices 8] [--seeds 3] [--output FILE.md]

Traces come in pairs of one model: traffic of the first, then of the second. By default the trace that ships, whose
sequences are divided in two kinds by what they have in common (the first principal component of their counts).
Traffic is 100 batches in 20 intervals. Every method begins with its own placement for the first five intervals, decides
at the end of each interval on what it has seen, and is judged on the next one: the mean over layers of the hottest
device over the mean, then over intervals. Moves are copies that a device must load, after the beginning. Cases:

- shift: half of the traffic is the first kind, then half the second; pieces of 16 tokens of a kind come in any order,
  as from a fleet that serves many requests at a time;
- drift: from the first kind to the second, a little in every interval;
- none: the first kind alone;
- recorded: the first trace in the order in which it was recorded, one request after the other.

Figures are means over seeds, of the order and of the searches; moves and alarms over the whole of the traffic.

EPLB (deepseek-ai/EPLB's algorithm, global, as in `moeplan.solvers.replication.eplb`) decides at every interval, on the
last one, or on the last five. "renamed" counts EPLB's moves after its devices were renamed to need the fewest, which
engines do not do. Prices of the loop: experts take half of the time, a placement serves an hour (all of the traffic), a
move takes 5 ms (50 MiB at 10 GiB/s), a pause 1 s. Prints the table and writes it with hardware and command.
"""

import argparse
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
from rich.console import Console

from moeplan.benchmarks.hardware import processor
from moeplan.benchmarks.inputs import PAGE
from moeplan.planner.budget import Budget
from moeplan.planner.place.fleet import Fleet, even_fleet
from moeplan.planner.place.ready import solvers_ready
from moeplan.planner.place.replan import renamed
from moeplan.planner.place.score import reached_balance
from moeplan.planner.rebalance.decide import WINDOWS, Prices, Terms, decide
from moeplan.planner.rebalance.watcher import Rules, Watcher
from moeplan.solvers.replication.eplb import eplb
from moeplan.solvers.replication.replicate import replicate
from moeplan.solvers.slots import EMPTY, Slots
from moeplan.spec import Trace

ROOT = Path(__file__).parents[1]
INTERVALS, PER_INTERVAL, FIRST = 20, 5, 5  # intervals, batches of each, intervals before anything is decided
HOUR, PIECE = 3600.0, 16
COLUMNS = ("traffic", "slots", "method", "balance", "over the loop's", "moves", "renamed", "alarms")
Row = tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "watch.md")
    args = parser.parse_args()
    if len(args.traces) % 2:
        parser.error("traces come in pairs: traffic of the first, then of the second")
    solvers_ready(None)
    shipped = Trace.read(ROOT / "examples" / "tiny_moe" / "trace.npz")
    pairs = [("tiny_moe", *two_kinds(shipped))]
    for first, second in zip(args.traces[::2], args.traces[1::2], strict=True):
        pairs.append((f"{first.stem} to {second.stem}", Trace.read(first), Trace.read(second)))
    console, rows = Console(width=150), [table_row(COLUMNS), table_row(("---",) * len(COLUMNS))]
    for line in rows:
        console.print(line)
    command = " ".join(["python -m moeplan.benchmarks.watch", *map(str, sys.argv[1:])])
    head = f"# Watching\n\n{date.today()}, {processor()}, {args.devices} devices. Command: `{command}` {PAGE}\n\n"
    for name, first, second in pairs:
        for case, make in CASES.items():
            traffic = [make(first, second, np.random.default_rng(seed)) for seed in range(args.seeds)]
            for slots in slots_of(first.num_experts, args.devices):
                for row in compare(traffic, slots, args.devices):
                    rows.append(table_row((f"{name}, {case}", str(slots), *row)))
                    console.print(rows[-1], highlight=False)
        # After every pair: they take minutes.
        text = __doc__.partition("\n\n")[2].partition("\n\n")[2]
        args.output.write_text(head + text + "\n" + "\n".join(rows) + "\n")


def slots_of(experts: int, devices: int) -> tuple[int, ...]:
    """One copy of each expert, and an eighth more, as EPLB needs them: a multiple of the devices."""
    return tuple(dict.fromkeys(-(-count // devices) * devices for count in (experts, experts * 9 // 8)))


def compare(traffic: list[np.ndarray], slots: int, devices: int) -> list[Row]:
    """A row of each method; traffic: [B, L, E] of each seed."""
    fleet, found = Fleet.of(even_fleet(devices, 1, slots, True)), []
    for seed, batches in enumerate(traffic):
        loop, alarms = watched(batches, fleet, seed)
        methods = {"loop": loop, "never": loop[:1] * len(loop)}
        methods |= {f"EPLB, last {n}": at_intervals(batches, slots, devices, n) for n in (1, 5)}
        found.append(
            {
                name: (balance(p, batches, fleet), moves(p, fleet), moves(p, fleet, rename=True), alarms)
                for name, p in methods.items()
            }
        )
    means = {name: np.mean([each[name] for each in found], axis=0) for name in found[0]}
    rows: list[Row] = []
    for name, (reached, moved, fewest, alarms) in means.items():
        more = f"{reached / means['loop'][0] - 1:+.1%}"
        own = f"{fewest:.0f}" if name.startswith("EPLB") else ""
        rows.append((name, f"{reached:.4f}", more, f"{moved:.0f}", own, f"{alarms:.1f}" if name == "loop" else ""))
    return rows


def watched(traffic: np.ndarray, fleet: Fleet, seed: int) -> tuple[list[Slots], int]:
    """The loop's placement in every interval from ``FIRST`` on, and its alarms."""
    known_after = FIRST * PER_INTERVAL  # batches
    rules = Rules(window=(known_after - 1.5) * HOUR / len(traffic), least=known_after)
    watcher, alarms = Watcher(rules, *traffic.shape[1:]), 0
    prices = Prices(HOUR, 0.5, np.full(traffic.shape[1], 50 * 2**20 / (10 * 2**30)), 1.0)
    begin = np.stack([part.sum(axis=0) for part in np.array_split(traffic[:known_after], WINDOWS)])
    placed = [replicate(begin, fleet.speed, fleet.capacity, fleet.hosts, full=True, seed=seed).assignment]
    for interval in range(INTERVALS - 1):
        reasons = []
        for batch in range(interval * PER_INTERVAL, (interval + 1) * PER_INTERVAL):
            reasons.append(watcher.add(HOUR * (batch + 1) / len(traffic), traffic[batch]))
        known = [reason for reason in reasons if reason]
        alarms += known.count("drift")
        if interval < FIRST - 1:
            continue
        found = None
        if known:
            found = decide(
                placed[-1], watcher.batches(), fleet, prices, Terms(full=True, seed=seed), Budget.of(HOUR)
            ).slots
        if interval >= FIRST:
            placed.append(placed[-1])
        placed[-1] = found or placed[-1]
    return placed, alarms


def at_intervals(traffic: np.ndarray, slots: int, devices: int, last: int) -> list[Slots]:
    """EPLB's placement in every interval from ``FIRST`` on, each for so many intervals before it."""
    per = traffic.reshape(INTERVALS, PER_INTERVAL, *traffic.shape[1:]).sum(axis=1)
    ends = range(FIRST, INTERVALS)
    first = eplb(per[:FIRST].sum(axis=0), slots, 1, 1, devices)
    return [first, *(eplb(per[max(0, end - last) : end].sum(axis=0), slots, 1, 1, devices) for end in ends[1:])]


def balance(placed: list[Slots], traffic: np.ndarray, fleet: Fleet) -> float:
    """Mean over intervals and layers, each interval under the placement that was decided on before it."""
    per = traffic.reshape(INTERVALS, PER_INTERVAL, *traffic.shape[1:]).sum(axis=1)[FIRST:]
    return float(np.mean([reached_balance(p, load[None], fleet.speed) for p, load in zip(placed, per, strict=True)]))


def moves(placed: list[Slots], fleet: Fleet, *, rename: bool = False) -> int:
    """Copies that devices load from one interval to the next."""
    total, before = 0, placed[0]
    for after in placed[1:]:
        now = renamed(before, after, fleet, each_layer=True, hosts_apart=False) if rename else after
        held, holds = (_held(slots) for slots in (before, now))
        total += int((holds & ~held).sum())
        before = now
    return total


def _held(slots: Slots) -> np.ndarray:
    """[L, G, E] whether a device holds an expert."""
    found = np.zeros((len(slots.expert_of), len(slots.capacity), slots.num_experts), bool)
    layer, slot = np.nonzero(slots.expert_of != EMPTY)
    found[layer, slots.device_of_slot[slot], slots.expert_of[layer, slot]] = True
    return found


def two_kinds(trace: Trace) -> tuple[Trace, Trace]:
    """The sequences of a trace in halves, by the first principal component of their shares of experts."""
    ends = np.cumsum(trace.seq_len)
    each = np.split(trace.expert_ids, ends[:-1])
    shares = np.stack([counted(ids, trace.num_experts).ravel() / len(ids) for ids in each])
    order = np.argsort(np.linalg.svd(shares - shares.mean(axis=0), full_matrices=False)[0][:, 0], kind="stable")
    halves = [np.sort(part) for part in np.array_split(order, 2)]
    one, two = (Trace.of(np.concatenate([each[i] for i in half]), trace.num_experts) for half in halves)
    return one, two


def counted(ids: np.ndarray, experts: int) -> np.ndarray:
    """[L, E] of ids [T, L, K]."""
    return np.stack([np.bincount(ids[:, j].ravel(), minlength=experts) for j in range(ids.shape[1])]).astype(float)


def batched(ids: np.ndarray, experts: int) -> np.ndarray:
    """[B, L, E] of ids [T, L, K] in equal batches."""
    return np.stack([counted(part, experts) for part in np.array_split(ids, INTERVALS * PER_INTERVAL)])


def mixed(ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same tokens, pieces of them in any order."""
    pieces = np.array_split(ids, -(-len(ids) // PIECE))
    return np.concatenate([pieces[i] for i in rng.permutation(len(pieces))])


def shift(first: Trace, second: Trace, rng: np.random.Generator) -> np.ndarray:
    count = min(first.tokens, second.tokens)
    halves = [mixed(trace.expert_ids, rng)[:count] for trace in (first, second)]
    return batched(np.concatenate(halves), first.num_experts)


def drift(first: Trace, second: Trace, rng: np.random.Generator) -> np.ndarray:
    """Piece i of n is of the second kind with probability i / n."""
    count = min(first.tokens, second.tokens)
    pieces = [np.array_split(mixed(trace.expert_ids, rng)[:count], count // PIECE) for trace in (first, second)]
    kinds = rng.random(len(pieces[0])) < np.arange(len(pieces[0])) / len(pieces[0])
    return batched(np.concatenate([pieces[int(kind)][i] for i, kind in enumerate(kinds)]), first.num_experts)


def none(first: Trace, second: Trace, rng: np.random.Generator) -> np.ndarray:
    return batched(mixed(first.expert_ids, rng), first.num_experts)


def recorded(first: Trace, second: Trace, rng: np.random.Generator) -> np.ndarray:
    return batched(first.expert_ids, first.num_experts)


CASES: dict[str, Callable[[Trace, Trace, np.random.Generator], np.ndarray]] = {
    "shift": shift,
    "drift": drift,
    "none": none,
    "recorded": recorded,
}


def table_row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

"""How far the order of a hierarchical layer's chunks is from the best one, on durations drawn at random.

    python -m moeplan.benchmarks.chunk_order [--draws 100] [--seed 0]

Three streams (between hosts, inside, device), chunks that are alike; the runtime's order (``spec.chunk_order``), the
best of all orders of the calls, and CP-SAT's optimum, which may also send in any order. Then the number of chunks free,
with so much for every message and call: the runtime's order in its best number of chunks beside the best order in its
own. Seconds are of no account: nothing is measured.
"""

import argparse
import random
from collections.abc import Callable, Sequence

import numpy as np

from moeplan.spec.chunk_order import Call, calls
from moeplan.tests.yardsticks.chunk_order import LEVELS, best_makespan, every_order, played

Draw = Callable[[random.Random], tuple[int, ...]]
LONGEST, COUNTS, EXTRA = 40, (2, 3, 4), (0, 1, 4)


def in_levels(across: int, inside: int, experts: int, relay: int) -> tuple[int, ...]:
    return across, relay, inside, experts, inside, relay, across


def anything(draw: random.Random) -> tuple[int, ...]:
    return tuple(draw.randint(0, LONGEST) for _ in LEVELS)


def short_relays(draw: random.Random) -> tuple[int, ...]:
    across, inside, experts = (draw.randint(0, LONGEST) for _ in range(3))
    return in_levels(across, inside, experts, draw.randint(0, 4))


def slow_between_hosts(draw: random.Random) -> tuple[int, ...]:
    inside, experts = (draw.randint(0, LONGEST) for _ in range(2))
    return in_levels(LONGEST, inside, experts, draw.randint(0, 4))


KINDS: dict[str, Draw] = {
    "anything": anything,
    "relays short": short_relays,
    "and slow between hosts": slow_between_hosts,
}


def alike(order: Sequence[tuple[Call, int]], steps: Sequence[float]) -> float:
    """The end of chunks that are alike."""
    return played(order, lambda _: steps)


def said(ratios: list[float]) -> str:
    return f"{np.mean(ratios) - 1:6.1%} | {np.quantile(ratios, 0.95) - 1:6.1%} | {max(ratios) - 1:6.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print("| durations | chunks | compared | mean | 95 % | worst |\n|---|---|---|--:|--:|--:|")
    orders = {count: list(every_order(count)) for count in COUNTS}
    for kind, make in KINDS.items():
        draw = random.Random(given.seed)
        drawn = [make(draw) for _ in range(given.draws)]
        for count in COUNTS:
            fixed = [alike(calls(count), d) for d in drawn]
            least = [min(alike(order, d) for order in orders[count]) for d in drawn]
            proven = [best_makespan(*([step] * count for step in d), streams=LEVELS) for d in drawn]
            for name, other in (("the best order of calls", least), ("CP-SAT's optimum", proven)):
                over = [a / b for a, b in zip(fixed, other, strict=True) if b]
                print(f"| {kind} | {count} | over {name} | {said(over)} |")
        for extra in EXTRA:
            over = []
            for d in drawn:
                cut = {count: [step / count + extra for step in d] for count in (1, *COUNTS)}
                fixed = [alike(calls(count), s) for count, s in cut.items()]
                least = [
                    min(alike(order, s) for order in orders.get(count, [calls(count)])) for count, s in cut.items()
                ]
                over.append(min(fixed) / min(least) if min(least) else 1.0)
            print(f"| {kind} | any, {extra} for each step | over the best order of calls | {said(over)} |")


if __name__ == "__main__":
    main()

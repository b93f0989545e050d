"""What the next layer needs, foreseen from what the layer before needs: hit rates on the held-out half of a trace.

    python -m moeplan.benchmarks.foresight [TRACE.npz ...] [--devices 2] [--share 0.25] [--steps 64] [--output FILE.md]

Memory holds ``--share`` of every device's experts, those that a step most likely needs. Everything is known from the
first half of the trace; many steps are drawn from the second. Nothing is executed or timed: a step's routing says what
it needs. Three ways to read ahead what rests, in every layer but the first:

    foreseen      what is needed with a probability of at least p, given what the layer before needs
    as many       as many experts as that, those that are needed most often
    list          what is needed with a probability of at least p by its frequency

Of the experts that a way reads ahead, ``right`` are needed; of those that are needed it reads ``found`` ahead.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moeplan.benchmarks.inputs import PAGE
from moeplan.planner.foresight import PRIOR, follows, foresight_of
from moeplan.planner.offloading import AHEAD, kept, likely, needs
from moeplan.spec import Trace, Workload
from moeplan.spec.foresight import foreseen
from moeplan.spec.output import write_atomically
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import traced_routing

HERE = Path(__file__).parent
TINY = HERE.parent / "examples/tiny_moe/trace.npz"
WAYS = ("foreseen", "as many", "list")


class Rates:
    """Experts that were read ahead, were needed, and both."""

    def __init__(self) -> None:
        self.read = self.needed = self.both = 0

    def add(self, early: Sequence[int], wanted: set[int]) -> None:
        self.read, self.needed = self.read + len(early), self.needed + len(wanted)
        self.both += len(wanted.intersection(early))

    def cells(self, steps: int) -> str:
        right = f"{self.both / self.read:.0%}" if self.read else "-"
        return f"{self.read / steps:.1f} | {right} | {self.both / self.needed:.0%}"


def divided(needed: np.ndarray, devices: int, share: float) -> list[LayerPlan]:
    """Experts by number, that share of each device's in its memory; needed: [L, E]."""
    layers, experts = needed.shape
    slots = tuple(tuple(map(int, part)) for part in np.array_split(np.arange(experts), devices))
    stays = [kept(needed, [held] * layers, int(share * len(held) * layers)) for held in slots]
    return [
        LayerPlan(
            strategy="offload",
            slots=slots,
            resident=tuple(tuple(sorted(of[j])) for of in stays),
            ahead=((),) * devices,
        )
        for j in range(layers)
    ]


def rates(trace: Trace, workload: Workload, devices: int, share: float, steps: int) -> Iterator[str]:
    """A line of the table for each probability."""
    fit, rest = trace.part(0, 0.5), trace.part(0.5, 1)
    needed = needs(fit.expert_counts / fit.tokens, workload.tokens)
    plans, chances = divided(needed, devices, share), follows(fit.expert_ids, trace.num_experts)
    drawn = [traced_routing(rest, workload, seed).expert_ids for seed in range(steps)]
    for least in AHEAD:
        foresight, found = foresight_of(chances, fit.tokens, plans, least), {way: Rates() for way in WAYS}
        for j, plan in enumerate(plans[1:], 1):
            assert plan.resident is not None
            for g, (held, stays) in enumerate(zip(plan.slots, plan.resident, strict=True)):
                ahead = foreseen(foresight, j, plan.slots, plan.resident, trace.top_k, g)
                ranked, listed = (likely(needed[j], held, set(stays), p) for p in (0.0, least))
                for ids in drawn:
                    wanted = set(ids[:, j].ravel().tolist()).intersection(held).difference(stays)
                    early = ahead.ahead(np.bincount(ids[:, j - 1].ravel(), minlength=trace.num_experts))
                    for way, experts in zip(WAYS, (early, ranked[: len(early)], listed), strict=True):
                        found[way].add(experts, wanted)
        cells = " | ".join(found[way].cells(steps) for way in WAYS)
        yield f"{workload} | {found['list'].needed / steps:.1f} | {least:g} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path, default=[TINY])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--workloads", default="decode:1@128,decode:4@128,decode:16@128,prefill:64@64")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "foresight.md")
    args = parser.parse_args()
    lines = []
    for path in args.traces:
        trace = Trace.read(path)
        name = f"{path.parent.name}/{path.stem}"
        for text in args.workloads.split(","):
            found = rates(trace, Workload.from_text(text), args.devices, args.share, args.steps)
            for line in found:
                lines.append(f"| {name} | {line}")
                print(lines[-1])
    command = f"--devices {args.devices} --share {args.share:g} --steps {args.steps} --workloads {args.workloads}"
    text = (
        f"# What the next layer needs, foreseen\n\n`python -m moeplan.benchmarks.foresight {command}` and the traces "
        f"of the table {PAGE}. Memory for {args.share:.0%} of every device's experts; known from the first half of a "
        "trace, counted on steps of the second, per step, in all layers but the first. What follows an expert counts "
        f"beside {PRIOR:g} tokens of the next layer's own frequencies. Right: of the experts read ahead, those that "
        "are needed. Found: of those that are needed from outside memory, those read ahead. As many: as many as are "
        "foreseen, by their frequency. List: those that their frequency alone makes as likely as p.\n\n"
        "| trace | step | needed | p | foreseen | right | found | as many | right | found | list | right | found |\n"
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    text += "\n".join(lines) + "\n"
    write_atomically(args.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()

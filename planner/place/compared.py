"""What a placement is compared with, linear and EPLB, and the scores of all of them."""

# L layers, E experts

import time

from ...solvers.slots import EMPTY, Slots
from ...spec.errors import DocumentError
from ...spec.placement import PlacementLayer, Score, Scores
from ...spec.trace import Trace
from ..budget import Budget
from . import baselines
from .fleet import Fleet
from .layers import document_layers
from .request import Request
from .score import Scorer

FINISH = 1.3  # times what scoring took: slack for a machine that got busier
DOCUMENT_TIME = 0.12  # seconds of a processor to check, write and print the answer, and to end


def baseline_slots(fitted: Trace, request: Request, fleet: Fleet) -> dict[str, Slots]:
    """What a user would do instead: linear, and EPLB with as many slots; left out where it does not fit."""
    linear = baselines.linear_slots(fitted.layers, fitted.num_experts, fleet)
    eplb = baselines.eplb_slots(fitted.expert_counts, request.slots, request.groups, fleet)
    named = {"linear": linear, "eplb": eplb}
    return {name: slots for name, slots in named.items() if slots is not None}


def scores(layers: tuple[PlacementLayer, ...], request: Request, fitted: Trace, rest: Trace | None) -> Scores:
    """On the fitted part, and on the rest where there is one."""

    scorer = Scorer(layers, request.devices, fitted.num_experts)

    def on(part: Trace) -> Score:
        found = scorer.on(part)
        timing = request.timing
        return found if timing is None else found.model_copy(update={"step_seconds": timing.seconds(layers, part)})

    return Scores(fit=on(fitted), held_out=None if rest is None else on(rest))


def rest_of(trace: Trace, fit: tuple[float, float]) -> Trace | None:
    """What follows the fitted part, or is before it; None where nothing is left."""
    low, high = fit
    if trace.counts_only or (low, high) == (0, 1):
        return None
    try:
        return (trace.part(high, 1.0) if high < 1 else trace.part(0.0, low)).for_placement()
    except DocumentError:  # the nearest end of a sequence is the end of the trace
        return None


def scored(
    usual: dict[str, Slots], request: Request, fitted: Trace, rest: Trace | None, budget: Budget
) -> tuple[dict[str, Scores], float]:
    """What a user would do instead, scored, and the seconds to keep free at the end: for scores and the document."""
    known, longest = {}, 0.0
    for name, slots in usual.items():
        began = time.perf_counter()
        known[name] = scores(document_layers(slots), request, fitted, rest)
        longest = max(longest, time.perf_counter() - began)
    return known, FINISH * (longest + DOCUMENT_TIME * budget.slowdown)


def compared_notes(usual: dict[str, Slots], fitted: Trace, request: Request, fleet: Fleet) -> list[str]:
    """Why a placement that others are compared with is missing, or holds less than its slots."""
    notes = []
    if "linear" not in usual:
        notes.append("linear is not compared: a device has too few slots for its block of experts")
    if "eplb" not in usual:
        reason = baselines.eplb_refuses(fitted.expert_counts, request.slots, request.groups, fleet)
        notes.append(f"EPLB is not compared: {reason}")
    else:
        twice = len(fitted.expert_counts) * request.slots - int((usual["eplb"].expert_of != EMPTY).sum())
        if twice:
            notes.append(
                f"EPLB puts {twice} copies, of {len(fitted.expert_counts) * request.slots}, on a device that holds the "
                "same expert already: they save nothing and are left out"
            )
    return notes

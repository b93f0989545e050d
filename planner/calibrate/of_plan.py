"""A plan as predictions of served loads: a served model's of its load, any other of its one step."""

from collections.abc import Sequence

from pydantic import ValidationError

from ...spec.calibration import ServedTimes
from ...spec.document import describe
from ...spec.errors import MoeplanError
from ...spec.plan import Plan
from ...spec.serving import Replicas, ServingPlan
from .calibrate import CLOSE


def of_plan(plan: Plan, measurements: Sequence[ServedTimes]) -> list[ServedTimes]:
    """What the plan predicts of those measured loads that it is for. Raises MoeplanError where it is for none.

    A decode step of B sequences with C tokens before them is the time per output token of B requests at a time: their
    mean context is isl + osl / 2. A prefill step of B prompts of C tokens is the time to the first token of B requests
    that come together.
    """
    load, step = plan.workload, 1e3 * plan.predicted.step_seconds
    decodes = load.phase == "decode"
    length = load.context if decodes else load.length
    time = {"tpot_ms": step} if decodes else {"ttft_ms": step}
    found = [
        ServedTimes(isl=m.isl, osl=m.osl, concurrency=m.concurrency, **time)
        for m in measurements
        if _near(m.concurrency, load.sequences) and _near(m.isl + m.osl / 2 if decodes else m.isl, length)
    ]
    if not found:
        mean = "isl + osl / 2" if decodes else "isl"
        raise MoeplanError(
            f"the plan is for {load}: no measurement has a concurrency of {load.sequences} and {mean} of {length}, "
            f"both within {CLOSE:.0%}; measure that, or give a CSV of predictions"
        )
    return found


def of_serving_plan(plan: ServingPlan) -> ServedTimes:
    """What the plan predicts of its load: means over all requests, which replicas share.

    Of a load that says no concurrency it is that of Little's law. Raises MoeplanError where a time is out of range.
    """
    ttft = _mean([(r, r.each.ttft_s) for r in plan.replicas if r.role != "decode"])
    tpot = _mean([(r, r.each.tpot_s) for r in plan.replicas if r.role != "prefill"])
    load = plan.load
    in_flight = load.concurrency or max(1, round(min(1e9, plan.requests_per_s * (ttft + tpot * (load.osl - 1)))))
    times = {"ttft_ms": 1e3 * ttft or None, "tpot_ms": 1e3 * tpot or None}  # none: of one output token no TPOT
    try:
        return ServedTimes(isl=load.isl, osl=load.osl, concurrency=in_flight, **times)
    except ValidationError as error:
        raise MoeplanError(f"the plan of {load}: {describe(error)}") from None


def _mean(found: Sequence[tuple[Replicas, float]]) -> float:
    """Weighted by shares of the requests."""
    share = sum(r.share for r, _ in found)
    return sum(r.share * seconds for r, seconds in found) / share if share else 0.0


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= CLOSE * b

"""A plan as predictions of served loads: its one step, for the measurements that are of such steps."""

from collections.abc import Sequence

from ...spec.calibration import ServedTimes
from ...spec.errors import MoeplanError
from ...spec.plan import Plan
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


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= CLOSE * b

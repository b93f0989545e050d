"""The few points of a plan's prediction that ``run`` times again beside its steps: does the machine run as profiled?

As a step is timed: by the time of day, whatever others take, over stretches long enough to be an average.
"""

import time
from typing import Any

import torch

from ..runtime.calls import operator_call
from ..runtime.launch import Rank
from ..runtime.load import LoadMeter
from ..runtime.pools import COLD_BYTES, forget
from ..spec.plan import Plan, ProbePoint
from .collectives import collective_call
from .measure import WORK, Bench, Pace, StepTimer, measure, timer
from .operators import TORCH_DTYPES
from .worker import agreement, open_bench

PACE = Pace(0.02, 0.2)  # a batch spans several turns of a core that is shared


def probe(rank: Rank, job: dict[str, Any]) -> dict[str, Any]:
    """job: ``plan`` (JSON). Returns ``seconds``, one for each probe of the plan; none where memory is short."""
    plan = Plan.parse(job["plan"], "plan")
    bench = open_bench(rank, agreement(rank.device), LoadMeter(), 0.0, lambda text: None)
    if bench.available < 4 * COLD_BYTES:
        return {"seconds": []}
    try:
        with torch.inference_mode():
            return {"seconds": [_time(point, plan, bench) for point in plan.probes]}
    finally:
        forget()


def _time(point: ProbePoint, plan: Plan, bench: Bench) -> float:
    dtype, world = TORCH_DTYPES[plan.dtype], bench.world
    if point.kind == "exchange":
        call = collective_call(point.operator, "equal", point.at["bytes"], world, bench.rank, dtype, bench.device, None)
        if bench.device.type == "cuda":
            return measure(timer([call], bench.device), bench.agree, PACE, together=True).median
        run = StepTimer(call, shared=True)
        return measure(run, bench.agree, PACE, other=WORK, together=True).median
    model = plan.model
    operator = operator_call(
        point.operator, model, model.moe_block(), dtype, bench.device, devices=world, tensor=1, **point.at
    )
    return measure(timer([operator], bench.device, time.perf_counter), bench.agree, PACE).median

"""What every rank does to run several plans in turn, without starting anew for each."""

import gc
from typing import Any

from moeplan.runtime.launch import Rank
from moeplan.runtime.worker import run_plan


def run_all(rank: Rank, job: dict[str, Any]) -> dict[str, Any]:
    """job: ``jobs`` of ``worker.run_plan``. Result: ``results``, one of each."""
    results = []
    for each in job["jobs"]:
        results.append(run_plan(rank, each))
        gc.collect()
    return {"results": results}

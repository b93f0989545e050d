"""One picture per strategy: what every device did in a step in the lab, beside what was predicted.

    python -m moeplan.benchmarks.timelines [--cases ep,chunks,...] [--folder docs/strategies/pictures]

One profile of the lab, then a plan and a run for each case, as ``moeplan run plan.json --timeline FILE.png --cluster
cluster.json`` draws them: the step of median duration. Linux and root.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from moeplan import Cluster, Model, Plan, Workload
from moeplan.benchmarks.offload import limit_of
from moeplan.benchmarks.systems import again, lab_model, shortcut
from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.profiler import profile
from moeplan.runtime.launch.choose import choose_launcher
from moeplan.runtime.run import run
from moeplan.service.pages.timeline_picture import draw_timeline
from moeplan.spec import MoeplanError

HERE = Path(__file__).parent
PROFILE_SECONDS, STEP_SECONDS = 150, 12.0
RESIDENT = 0.5  # of a device's experts that fit its memory, under offload
console = Console(stderr=True)


class Case(NamedTuple):
    """A model, a workload, and the plan for it."""

    model: Model
    workload: str
    plan: Callable[[Model, Cluster, Workload], Plan]


def planned(strategy: str, model: Model, cluster: Cluster, workload: Workload) -> Plan:
    return solve(model, cluster, workload, strategy=strategy)


def chunked(count: int, model: Model, cluster: Cluster, workload: Workload) -> Plan:
    return again(planned("ep", model, cluster, workload), cluster, chunks=count)


def beyond_memory(model: Model, cluster: Cluster, workload: Workload) -> Plan:
    limit = limit_of(model, cluster, workload, None, RESIDENT)
    return solve(model, cluster, workload, strategy="offload", memory_bytes=limit)


def cases() -> dict[str, Case]:
    plain, beside = lab_model(), shortcut("mid")
    return {
        "ep": Case(plain, "prefill:512", partial(chunked, 1)),
        "chunks": Case(plain, "prefill:512", partial(chunked, 4)),
        "hierarchical": Case(plain, "prefill:512", partial(planned, "hierarchical")),
        "sharded": Case(plain, "prefill:512", partial(planned, "sharded")),
        "gathered": Case(plain, "prefill:512", partial(planned, "gathered")),
        "coherent": Case(plain, "decode:16", partial(planned, "coherent")),
        "shortcut": Case(beside, "prefill:512", partial(planned, "ep")),
        "offload": Case(plain, "prefill:512", beyond_memory),
    }


def main() -> None:
    every = cases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(every))
    parser.add_argument("--lab", type=Path, default=HERE.parent / "examples/labs/two-hosts.yaml")
    parser.add_argument("--folder", type=Path, default=HERE.parent / "docs/strategies/pictures")
    args = parser.parse_args()
    names = args.cases.split(",")
    if unknown := set(names) - set(every):
        raise SystemExit(f"--cases {', '.join(sorted(unknown))}: known are {', '.join(every)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    with choose_launcher(lab=args.lab) as launcher, tempfile.TemporaryDirectory() as disk:
        models = list({case.model.name: case.model for case in every.values()}.values())
        cluster = profile(launcher, models, budget_seconds=PROFILE_SECONDS, accept_noise=True, offload=Path(disk))
        for name in names:
            case = every[name]
            plan = case.plan(case.model, cluster, Workload.from_text(case.workload))
            report = run(plan, launcher, tolerance=10.0, step_budget=STEP_SECONDS, timeline=True)
            if report.check is None or not report.check.passed:
                raise MoeplanError(f"{name}: the output is not the reference's")
            predicted = Step.of(plan, cluster).timeline(plan.layers)
            title = f"{name}, {report.model}, {report.workload}"
            draw_timeline(title, report.timeline, predicted, args.folder / f"{name}.png")
            step = report.step
            console.print(f"{name}: {step.predicted * 1e3:.1f} ms predicted, {step.measured * 1e3:.1f} measured")


if __name__ == "__main__":
    main()

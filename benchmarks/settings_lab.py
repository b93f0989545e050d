"""One lab setting: plans of every strategy and the free choice, predicted from one profile and run in turn.

What was measured is kept in a folder, one file for each lab's profile and one for each setting, and not measured again.
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeplan import Cluster, Model, Plan, Trace, Workload
from moeplan.planner.search import solve
from moeplan.profiler import profile
from moeplan.runtime.launch import Lab, LabLauncher, LabSpec, Launcher
from moeplan.runtime.run import assemble
from moeplan.runtime.worker import Job
from moeplan.spec.catalogue import load_model
from moeplan.spec.document import write_atomically
from moeplan.spec.errors import MoeplanError
from moeplan.spec.plan import IN_MEMORY

MODELS = Path(__file__).parent.parent / "examples" / "labs"
ENTRY = "moeplan.benchmarks.settings_ranks:run_all"
PROFILE_SECONDS, SOLVE_SECONDS = 75.0, 12.0
STEP_SECONDS, CHECK_SECONDS = 3.0, 2.0  # of each plan and round; checks are made in the first
HOPELESS = 5.0  # a strategy predicted to take so many times the fastest one's seconds is not run
CHOSEN = "chosen"
NEEDED = ("sharded", "gathered")  # what fits into tight memory

Say = Callable[[str], None]


@dataclass(frozen=True)
class LabShape:
    """Hosts of ``ranks`` devices with so much of a core each, behind uplinks of ``gbit`` Gbit/s."""

    shares: tuple[float, ...]
    ranks: int
    gbit: float

    def __str__(self) -> str:
        return (
            f"{len(self.shares)} hosts x {self.ranks}, shares {'/'.join(map(str, self.shares))}, {self.gbit:g} Gbit/s"
        )

    def spec(self) -> LabSpec:
        hosts = [{"name": f"h{i}", "ranks": self.ranks, "cpu_share": share} for i, share in enumerate(self.shares)]
        return LabSpec.model_validate({"name": "settings", "hosts": hosts, "uplink_gbit": self.gbit})


@dataclass(frozen=True)
class Setting:
    """``model``: of the catalogue, or a folder of examples/labs. ``tight``: memory for what ``sharded`` and
    ``gathered`` need and a fiftieth more, so that the devices cannot all hold everything."""

    lab: LabShape
    model: str
    workload: str
    tight: bool = True

    def __str__(self) -> str:
        return f"{self.model}, {self.workload}{'' if self.tight else ', memory for all experts'}"

    def file(self, folder: Path) -> Path:
        return folder / f"{slug(f'{self.lab} {self}')}.json"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def model_of(name: str) -> Model:
    own = MODELS / name / "config.json"
    return load_model(str(own) if own.exists() else name)


def profiled(lab: LabShape, models: list[str], launcher: Launcher, folder: Path, say: Say) -> Cluster:
    """The lab's profile for these models, from the folder where it is there."""
    path = folder / f"cluster-{slug(f'{lab} {sorted(models)}')}.json"
    if not path.exists():
        say(f"profiling {lab}")
        found = profile(launcher, [model_of(name) for name in sorted(models)], budget_seconds=PROFILE_SECONDS)
        found.write(path)
    return Cluster.read(path)


def plans_of(setting: Setting, cluster: Cluster, trace: Trace | None = None, trace_path: str = "") -> dict[str, Plan]:
    """By strategy, where there is one, and the free choice last."""
    model, workload = model_of(setting.model), Workload.from_text(setting.workload)

    def solved(strategy: str | None, memory: int | None, **options: Any) -> Plan:
        common: dict[str, Any] = {"memory_bytes": memory, "time_limit": SOLVE_SECONDS, "trace_path": trace_path}
        return solve(model, cluster, workload, trace, strategy=strategy, **common, **options)

    limit = None
    if setting.tight:
        needed = [solved(name, None, even=True).predicted.memory for name in NEEDED]
        limit = int(1.02 * max(device.total for devices in needed for device in devices))
    found = {}
    for strategy in IN_MEMORY:
        try:
            found[strategy] = solved(strategy, limit)
        except MoeplanError:  # no levels with one device on a host, prompts are not coherent, memory is short
            continue
    return found | {CHOSEN: solved(None, limit)}


def same(a: Plan, b: Plan) -> bool:
    """Whether two plans do the same."""
    return (a.layers, a.tokens, a.degrees, a.sequences) == (b.layers, b.tokens, b.degrees, b.sequences)


def measured(setting: Setting, plans: dict[str, Plan], launcher: Launcher, rounds: int, say: Say) -> dict[str, Any]:
    """Predicted and measured seconds of every plan; plans that do the same, or are hopeless, are not run."""
    fastest = min(plan.predicted.step_seconds for plan in plans.values())
    run: dict[str, Plan] = {}
    alike: dict[str, str] = {}
    for name, plan in plans.items():
        if twin := next((other for other, its in run.items() if same(its, plan)), None):
            alike[name] = twin
        elif plan.predicted.step_seconds <= HOPELESS * fastest:
            run[name] = plan
    jobs = [job(plan, CHECK_SECONDS if i == 0 else 0.0) for i in range(rounds) for plan in run.values()]
    say(f"{setting.lab}, {setting}: {rounds} rounds of {', '.join(run)}")
    ranks = launcher.run(ENTRY, {"jobs": jobs}, timeout=300, on_event=None)
    found: dict[str, Any] = {name: entry(plan) for name, plan in plans.items()}
    for i, name in enumerate(list(run) * rounds):
        report = assemble(run[name], [rank["results"][i] for rank in ranks], tolerance=10.0)
        if report.check and not report.check.passed:
            raise MoeplanError(f"{setting}, {name}: output differs by {report.check.relative_error:.1e}")
        found[name]["measured"].append(report.step.measured)
        found[name]["spread"].append(report.step.spread)
    for name, twin in alike.items():
        found[name] |= {"as": twin, "measured": found[twin]["measured"], "spread": found[twin]["spread"]}
    return {"setting": asdict(setting), "plans": found}


def job(plan: Plan, check_seconds: float) -> dict[str, Any]:
    task = Job(plan.to_json(), plan.routing.path or None, None, None, STEP_SECONDS, check_seconds)
    return task.to_json()


def entry(plan: Plan) -> dict[str, Any]:
    """What a plan decided; chunks: the most of any layer."""
    strategies = [layer.strategy for layer in plan.layers]
    return {
        "predicted": plan.predicted.step_seconds,
        "measured": [],
        "spread": [],
        "layers": {name: strategies.count(name) for name in dict.fromkeys(strategies)},
        "chunks": max(layer.chunks for layer in plan.layers),
        "degrees": plan.degrees.model_dump(),
    }


def measure_settings(settings: list[Setting], folder: Path, rounds: int, say: Say, minutes: float) -> None:
    """Measure what is not in the folder yet, lab by lab, beginning no setting after so many minutes."""
    end = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    for lab in dict.fromkeys(setting.lab for setting in settings):
        own = [setting for setting in settings if setting.lab == lab]
        if all(setting.file(folder).exists() for setting in own) or time.monotonic() > end:
            continue
        with Lab(lab.spec()) as opened:
            launcher = LabLauncher(opened)
            cluster = profiled(lab, list({setting.model for setting in own}), launcher, folder, say)
            for setting in own:
                if setting.file(folder).exists() or time.monotonic() > end:
                    continue
                found = measured(setting, plans_of(setting, cluster), launcher, rounds, say)
                write(setting.file(folder), found)


def write(path: Path, body: dict[str, Any]) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(body, indent=1).encode()))

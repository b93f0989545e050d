"""From ranks' measurements to one ``spec.Cluster``."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..runtime.launch import LabLauncher, Launcher
from ..spec.cluster import Cluster, Host, Provenance
from ..spec.cluster.measurement import MeasuredCollective, MeasuredDevice, MeasuredLink, Measurement
from ..spec.cluster.sameness import by_class
from ..spec.curve import Curve
from ..spec.errors import MoeplanError
from ..spec.executed import check_executed
from ..spec.load import Load, worst
from ..spec.model import Model
from ..spec.workload import Workload
from .alike import within_spread
from .devices import check_device
from .noise import UNUSABLE_PART, UNUSABLE_SPREAD, noise, refusal, warnings
from .worker import PATIENCE_SHARE

BUDGET_SECONDS = 75.0
SILENCE_SECONDS = 120.0  # beyond the budget, without a sign of life: a rank hangs
ENTRY = "moeplan.profiler.worker:measure"


def profile(
    launcher: Launcher,
    models: Sequence[Model],
    dtype: str | None = None,
    *,
    device: str = "cpu",
    budget_seconds: float = BUDGET_SECONDS,
    accept_noise: bool = False,
    command: str = "moeplan profile",
    asked: Sequence[str] = (),
    workloads: Sequence[Workload] = (),
    offload: Path | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Cluster:
    """Measure the launcher's ranks for these models, each in ``dtype`` or else in its own.

    ``budget_seconds`` is what the ranks aim at once they run; a little more where a large model's smallest grids need
    it, and up to two fifths more where they wait for other programs to leave the processors alone. ``accept_noise``
    keeps curves that stayed noisy. asked: what the user typed for each model, named where it is refused. workloads: the
    sizes of their steps are measured too, even beyond the budget. offload: a folder of every host, whose disk is
    measured besides. Raises MoeplanError for noisy curves otherwise, for a model
    that the runtime does not execute and for GPUs that are not there.
    """
    if not models:
        raise MoeplanError("nothing to profile: name at least one model")
    for model, name in zip(models, asked or [model.name for model in models], strict=True):
        check_executed(model, name)
    check_device(device)
    job = {
        "models": [model.model_dump(mode="json") for model in models],
        "dtypes": [dtype or model.dtype for model in models],
        "seconds": budget_seconds,
        "workloads": [workload.model_dump(mode="json") for workload in workloads],
        "offload": None if offload is None else str(offload.absolute()),
    }
    lab = launcher.lab.spec.name if isinstance(launcher, LabLauncher) else None
    start = time.perf_counter()
    patience = (1 + PATIENCE_SHARE) * budget_seconds + SILENCE_SECONDS
    results = launcher.run(ENTRY, job, timeout=patience, on_event=on_event)
    provenance = Provenance(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions=results[0]["versions"],
        seconds=round(time.perf_counter() - start, 3),
        models=tuple(dict.fromkeys(model.name for model in models)),
        load=worst([Load.model_validate(result["load"]) for result in results]),
        waited=round(results[0]["waited"], 3),
        spread_limit=UNUSABLE_SPREAD,
        disturbed_limit=UNUSABLE_PART,
    )
    measured = assemble(results, provenance, lab)
    found = noise(measured, [result["disturbed"] for result in results])
    # A lab's ranks wait for their cores by design: spreads are wide there, and averages are what a run sees.
    if lab is None and not accept_noise and (unusable := refusal(found, provenance)):
        raise MoeplanError(unusable)
    said = [*warnings(found, provenance.load), *short(results[0]["lacking"])]
    judged = {"noise": found, "warnings": tuple(said), "noise_accepted": accept_noise}
    measured = measured.model_copy(update={"provenance": provenance.model_copy(update=judged)})
    return by_class(measured, within_spread)


def short(lacking: Sequence[str]) -> list[str]:
    """One line about the workloads' sizes that were too large."""
    names = "; ".join(lacking)
    return [f"too large for the memory or the --budget here, not measured: {names}"] if lacking else []


def assemble(results: Sequence[dict[str, Any]], provenance: Provenance, lab: str | None) -> Measurement:
    """One measurement from what the ranks returned, in rank order."""
    devices = tuple(MeasuredDevice.model_validate(result["device"]) for result in results)
    uplinks = results[0]["uplinks"]
    hosts = []
    for name in dict.fromkeys(device.host for device in devices):
        out, into = uplinks.get(name, (None, None))
        hosts.append(Host(name=name, uplink_out=out, uplink_in=into))
    members: dict[tuple[str, tuple[int, ...], str], list[dict[str, Any]]] = {}
    for result in results:
        for entry in result["collectives"]:
            members.setdefault((entry["collective"], tuple(entry["group"]), entry["traffic"]), []).append(entry)
    return Measurement(
        devices=devices,
        hosts=tuple(hosts),
        links=tuple(MeasuredLink.model_validate(link) for result in results for link in result["links"]),
        collectives=tuple(
            MeasuredCollective.model_validate(
                {
                    "collective": collective,
                    "group": group,
                    "traffic": traffic,
                    "curve": slowest([entry["curve"] for entry in entries]),
                    "busy": slowest([entry["busy"] for entry in entries]),
                    "last": slowest([entry["last"] for entry in entries]),
                }
            )
            for (collective, group, traffic), entries in members.items()
        ),
        lab=lab,
        provenance=provenance,
    )


def slowest(curves: Sequence[dict[str, Any]]) -> Curve:
    """A collective is over when its slowest member is: the largest value at each point of the members' equal grids."""
    parsed = [Curve.model_validate(curve) for curve in curves]
    return Curve(
        axes=parsed[0].axes,
        median=tuple(map(max, zip(*(curve.median for curve in parsed), strict=True))),
        spread=tuple(map(max, zip(*(curve.spread for curve in parsed), strict=True))),
    )

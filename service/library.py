"""moeplan from Python: what the commands do, as functions that take and return documents.

    from moeplan import Trace, place, profile, run, solve

Models are given by catalogue name, by the path of a ``config.json``, or as ``Model``; documents as objects or as paths.
Nothing is written. Every function raises ``MoeplanError``, in one line, for what cannot be done; times are in seconds.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from ..spec.cluster import Cluster
from ..spec.model import DType, Model
from ..spec.placement import Movement, Objective, Placement, Shares
from ..spec.plan import Plan
from ..spec.trace import Trace
from ..spec.workload import Workload
from .arguments import (
    check_choice,
    check_part,
    check_seconds,
    check_slots,
    check_whole,
    document,
    model_of,
    optional,
    workload_of,
)
from .selecting import selected_of

if TYPE_CHECKING:
    from ..spec.report import Report

OnEvent = Callable[[dict[str, Any]], None]
"""Is told of progress, ``{"done": i, "of": n, "what": text}``; keys may be missing."""


def profile(
    models: str | Model | Sequence[str | Model],
    *,
    dtype: DType | None = None,
    ranks: int | None = None,
    device: str | None = None,
    lab: str | Path | None = None,
    budget_seconds: float = 75.0,
    workloads: Workload | str | Sequence[Workload | str] = (),
    accept_noise: bool = False,
    on_event: OnEvent | None = None,
) -> Cluster:
    """Measure every device and link with the operators that these models run; see ``moeplan profile --help``.

    ranks: local ranks, by default two on processors and every GPU. device: ``cpu`` or ``cuda``. lab: a YAML file of an
    emulated cluster, which needs root. budget_seconds: to spend, about. workloads: steps whose sizes are measured too.

    >>> cluster = profile("tiny-moe", ranks=2)  # doctest: +SKIP
    """
    # torch takes seconds to import: only when it is needed.
    from ..profiler import profile as measure
    from ..runtime.launch.choose import choose_launcher

    given = [models] if isinstance(models, str | Model) else list(models)
    steps = [workloads] if isinstance(workloads, str | Workload) else list(workloads)
    with choose_launcher(_path(lab), ranks, device) as launcher:
        return measure(
            launcher,
            [model_of(model, executed=True) for model in given],
            dtype=dtype,
            budget_seconds=budget_seconds,
            accept_noise=accept_noise,
            command="moeplan.profile",
            asked=[_asked(model) for model in given],
            workloads=[workload_of(step) for step in steps],
            on_event=on_event,
        )


def solve(
    model: str | Model,
    cluster: Cluster | str | Path,
    workload: Workload | str = "decode:16@512",
    trace: Trace | str | Path | None = None,
    *,
    strategy: str | None = None,
    placement: Placement | str | Path | None = None,
    even: bool = False,
    by_batch: bool = False,
    dtype: DType | None = None,
    memory_bytes: int | None = None,
    seed: int = 0,
    time_limit: float = 60.0,
    on_event: OnEvent | None = None,
    stop: Event | None = None,
) -> Plan:
    """Degrees, splits, placement and a strategy per layer by predicted step time, with a proven bound.

    trace: recorded routing; without one a power law is assumed, and the plan says so. strategy: only this one for every
    layer. placement: experts where it says, under ``ep`` or as ``strategy`` says. even: as if all devices were equal.
    by_batch: ``ep`` with copies whose shares are decided for every batch. memory_bytes: limit of every device.
    stop: set it, from another thread, to end the search with the best found.

    >>> plan = solve("tiny-moe", "cluster.json", "prefill:2048", "trace.npz")  # doctest: +SKIP
    >>> plan.candidates_frame().head()  # doctest: +SKIP
    """
    from ..planner.budget import Budget
    from ..planner.search import solve as search

    check_whole(memory_bytes=memory_bytes)
    check_whole(0, seed=seed)
    check_seconds(False, time_limit=time_limit)
    check_choice(DType, dtype=dtype)
    recorded, trace_path = optional("trace", trace, Trace)
    given, placement_path = optional("placement", placement, Placement)
    return search(
        model_of(model, executed=True),
        document("cluster", cluster, Cluster)[0],
        workload_of(workload),
        recorded,
        placement=given,
        placement_path=placement_path,
        strategy=strategy,
        even=bool(even),
        by_batch=bool(by_batch),
        dtype=dtype,
        memory_bytes=memory_bytes,
        seed=seed,
        time_limit=time_limit,
        trace_path=trace_path,
        asked=_asked(model),
        budget=Budget.of(time_limit, stop=stop, on_event=on_event),
    )


def place(
    trace: Trace | str | Path,
    *,
    devices: int | None = None,
    hosts: int | None = None,
    slots: int | None = None,
    slots_per_device: Sequence[int] | None = None,
    equal_slots: bool = False,
    cluster: Cluster | str | Path | None = None,
    model: str | Model | None = None,
    workload: Workload | str | None = None,
    dtype: DType | None = None,
    fit: tuple[float, float] = (0.0, 1.0),
    objective: Objective = "latency",
    movement: Movement = "coherent",
    shares: Shares = "even",
    groups: int = 1,
    balance_cap: float | None = None,
    previous: Placement | str | Path | None = None,
    max_moves: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    time_limit: float = 20.0,
    on_event: OnEvent | None = None,
    stop: Event | None = None,
) -> Placement:
    """Experts on devices, so that tokens travel little and no device runs hot; see ``moeplan place --help``.

    devices, hosts: equal devices, by default 8 on one host; slots: copies per layer in all, by default one of every
    expert; slots_per_device instead where they differ. cluster and model: predicted time is then the objective, for
    workload (by default ``prefill:2048``) and dtype (by default the model's). fit: the part of the trace to fit, as
    fractions; the rest scores it. balance_cap: hottest device over the mean. previous, max_moves: start from a
    placement, and load at most so many copies. steps: proposals of each chain. stop: as of ``solve``.

    >>> place("trace.npz", fit=(0, 0.5), devices=8, hosts=2).scores_frame()  # doctest: +SKIP
    """
    from ..planner.budget import Budget
    from ..planner.place.solve import place as search
    from .asked import named_model, placement_request

    check_whole(devices=devices, hosts=hosts, slots=slots, groups=groups, steps=steps)
    check_whole(0, seed=seed, max_moves=max_moves)
    check_seconds(time_limit=time_limit)
    check_slots(slots_per_device)
    check_part("fit", fit)
    check_choice(DType, dtype=dtype)
    check_choice(Objective, objective=objective)
    check_choice(Movement, movement=movement)
    check_choice(Shares, shares=shares)
    recorded, path = document("trace", trace, Trace)
    old, old_path = optional("previous", previous, Placement)
    named = named_model(model, recorded, path or "trace", cluster is not None) if isinstance(model, str) else model
    if named is not None:
        named = model_of(named, executed=cluster is not None)
    request = placement_request(
        recorded,
        devices=devices,
        hosts=hosts,
        cluster=optional("cluster", cluster, Cluster)[0],
        model=named,
        workload=None if workload is None else workload_of(workload),
        dtype=dtype,
        asked="" if model is None else _asked(model),
        slots=slots,
        slots_per_device=slots_per_device,
        equal_slots=equal_slots,
        seed=seed,
        fit=fit,
        objective=objective,
        movement=movement,
        shares=shares,
        groups=groups,
        balance_cap=balance_cap,
        previous=old,
        max_moves=max_moves,
        steps=steps,
        time_limit=time_limit,
    )
    budget = Budget.of(time_limit, stop=stop, on_event=on_event)
    return search(recorded, request, trace_path=path, previous_path=old_path, model=named, budget=budget)


def run(
    plan: Plan | str | Path,
    *,
    trace: Trace | str | Path | None = None,
    lab: str | Path | None = None,
    weights: str | Path | None = None,
    own_routing: bool = False,
    select: str | None = None,
    quality_budget: float | None = None,
    text: str | Path | None = None,
    tolerance: float = 0.5,
    repetitions: int | None = None,
    timeout: float = 300.0,
    on_event: OnEvent | None = None,
) -> "Report":
    """Execute a plan on its devices, compare its output with a plain reference and its time with the prediction.

    trace: the plan's, where it was not read from a file or the file has moved. lab: the YAML file of the emulated
    cluster that the plan is for. weights: folder of Hugging Face safetensors; random weights without it. own_routing:
    the model's routers choose the experts. tolerance: largest |predicted / measured - 1| of the step that passes.
    select, quality_budget, text: compare decoding steps that use fewer experts, see ``moeplan run --help``.
    timeout: seconds without a sign of life of any rank.

    >>> report = run(plan)  # doctest: +SKIP
    >>> report.parts_frame()  # doctest: +SKIP
    """
    decided, _ = document("plan", plan, Plan)
    check_seconds(timeout=timeout)
    check_whole(repetitions=repetitions)
    selecting = selected_of(decided, select, quality_budget, _path(text), _path(weights))
    # torch takes seconds to import: a wrong file is refused before.
    from ..profiler import PROBE
    from ..runtime.launch.choose import choose_launcher
    from ..runtime.run import run as execute

    device = decided.devices[0].kind
    launching = choose_launcher(_path(lab), len(decided.devices), device, plan=decided)
    with _in_file(trace) as path, launching as launcher:
        return execute(
            decided,
            launcher,
            trace=path,
            weights_folder=_path(weights),
            own_routing=own_routing,
            tolerance=tolerance,
            repetitions=repetitions,
            timeout=timeout,
            probe=PROBE,
            selecting=selecting,
            on_event=on_event,
        )


def _asked(model: str | Model) -> str:
    """What the user typed, which advice names."""
    return model.name if isinstance(model, Model) else model


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


@contextmanager
def _in_file(trace: Trace | str | Path | None) -> Iterator[Path | None]:
    """Ranks are other processes, which read a trace from a file."""
    if not isinstance(trace, Trace):
        yield _path(trace)
        return
    with tempfile.TemporaryDirectory(prefix="moeplan-") as folder:
        path = Path(folder) / "trace.npz"
        trace.write(path)
        yield path

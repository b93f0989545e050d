"""Search for the plan that is predicted fastest, and say how far from optimal it can be.

Enumerated (``space``): layouts (tensor degree, division of the sequences) and expert degrees. In each, every
mixture-of-experts layer has options: strategy, placement, FFN split. The sum of the layers' seconds, each simulated by
itself, is minimised exactly under memory, once over all options and once for each strategy alone; these choices are
simulated whole, and the fastest is the plan.

Proof: in each layout and expert degree, two lower bounds hold for every choice of options: ``Step.lower_bound``
(chains of operations, memory ignored), and the least sum of ``Step.slowest_arrival`` under memory. The larger counts;
the least of these over all layouts and expert degrees is the bound of the whole space.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..solvers.result import Status
from ..spec.cluster import Cluster
from ..spec.errors import InfeasibleError, MoeplanError
from ..spec.model import DTYPE_BYTES, Model
from ..spec.offload import Offload
from ..spec.placement import Placement
from ..spec.plan import Plan, PlanDevice, RoutingSource, SolverRecord, Strategy
from ..spec.routing import Routing, check_shape, draw_routing, sample_routing
from ..spec.trace import Trace
from ..spec.workload import Workload
from .alternatives import Choice
from .budget import Budget
from .costs import Costs
from .given import Given
from .offered import asked_for, folder_of, offered, without_tier
from .probes import probe_points
from .said import ASSUMPTION, resting_notes, space
from .said import notes as notes_of
from .space import BASELINES, ROUNDING, Search
from .step import Step, check_supported
from .units import bytes_text, lacking
from .wholes import WHOLE

FINISH = 0.15  # of the time is kept for what follows the search
USABLE = 0.9  # of a device's measured free memory, where the user gives no limit; allocators need the rest
MOST_CHOICES = 2**22  # tokens x layers x top-k that are counted one by one
SAMPLED_CHOICES = 2**21  # in place of more


def solve(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    trace: Trace | None = None,
    *,
    placement: Placement | None = None,
    placement_path: str = "",
    strategy: str | None = None,
    even: bool = False,
    by_batch: bool = False,
    dtype: str | None = None,
    memory_bytes: int | None = None,
    seed: int = 0,
    time_limit: float = 60.0,
    trace_path: str = "",
    asked: str = "",
    budget: Budget | None = None,
) -> Plan:
    """The plan for one step of ``workload``.

    placement: the experts are where it says, in every layer, under ``ep`` unless ``strategy`` says hierarchical; only
    layouts are searched. strategy: force this one for every layer. even: divide tokens, FFN columns and experts as if
    all devices were equal, which shows what unequal shares gain. by_batch: ``ep`` with copies of experts whose shares
    are decided for every batch instead of here. dtype: the model's own by default. memory_bytes: limit on every device;
    without it, layers share storage where the devices cannot hold them all. time_limit: ceiling in seconds; the first
    layout is always searched. budget: what ends the whole of it instead, writing included, and hears of progress, once
    per space. trace_path: recorded in the plan for the runtime; placement_path: named in what is said. asked: what the
    user typed for the model, which advice names; by default its name.
    Ctrl-C, or the budget's ``stop``, ends the search and keeps what was found, once there is anything.

    Raises MoeplanError for models, curves, placements or arguments that cannot be planned, InfeasibleError where
    nothing fits.
    """
    started = time.perf_counter()
    dtype = dtype or model.dtype
    if by_batch and strategy not in (None, "ep"):
        raise MoeplanError(
            f"--by-batch does not go with --strategy {strategy}: only ep divides tokens between copies so"
        )
    strategies = asked_for("ep" if by_batch else strategy, placement, model, workload)
    _check_arguments(dtype, memory_bytes, time_limit)
    budget = budget or Budget.of(time_limit)
    check_supported(model, asked)
    given = None if placement is None else Given.of(placement, model, cluster, placement_path or "placement")
    if trace is not None:
        check_shape(trace, model, trace_path or "trace")
    costs, routing = Costs(cluster, model, dtype, asked), _routing(trace, model, workload, seed)
    strategies, unsearched = offered(strategies, costs, model, routing)
    search = Search(
        costs=costs,
        model=model,
        workload=workload,
        routing=routing,
        limits=[memory_bytes or int(USABLE * device.memory_bytes) for device in cluster.devices],
        strategies=tuple(known for known in strategies if known not in WHOLE),
        whole=tuple(known for known in strategies if known in WHOLE),
        trace=trace,
        by_batch=by_batch,
        stored=len(model.layers),
        even=even,
        seed=seed,
        budget=budget.part(1 - FINISH),
        given=given,
    )
    fixed = strategy is not None or given is not None or model.family_config is not None
    beyond = not fixed and not without_tier(cluster, routing)
    search = _searched_with_storage(search, shared=memory_bytes is None and given is None, beyond=beyond)
    source = _routing_source(trace, trace_path, seed)
    inputs = {"model": model, "cluster": cluster, "trace": trace, "placement": placement}
    digests = {name: document.digest() for name, document in inputs.items() if document is not None}
    return _plan(search, cluster, source, [*notes_of(search, trace), *unsearched], digests, started)


def _plan(
    search: Search,
    cluster: Cluster,
    source: RoutingSource,
    notes: list[str],
    digests: dict[str, str],
    started: float,
) -> Plan:
    """The document of the fastest alternative; started: ``time.perf_counter()`` when the search began."""
    best, model, dtype = _best(search), search.model, search.costs.dtype
    assert best is not None
    objective = best.seconds
    final = Costs(cluster, model, dtype)  # what it reads is of the chosen plan alone
    layout, places, foresight = best.step.layout, best.step.places, best.step.foresight
    step = Step(final, model, layout, search.routing, places, foresight, counted=best.step.counted)
    # The search adds up the same seconds in another order: a plan says one number, whatever the rounding.
    prediction = step.predict(best.plans, search.stored, search.limits).model_copy(update={"step_seconds": objective})
    bound = objective if search.bound > objective * (1 - ROUNDING) else search.bound
    complete = search.searched == search.spaces and not search.cut
    gap = (objective - bound) / objective
    status: Status = "time_limit" if not complete else "optimal" if gap == 0 else "feasible"
    notes = [*notes, *resting_notes(best.plans, search, cluster, foresight, prediction.reads)]
    placed = search.options.placement_records(best.plans) if search.given is None else (search.given.record,)
    return Plan(
        model=model,
        workload=search.workload,
        dtype=dtype,
        devices=tuple(
            PlanDevice(
                host=device.host,
                kind=kind.type,
                name=kind.product,
                threads=kind.threads,
                cpu_share=kind.cpu_share,
                memory_bytes=limit,
            )
            for i, (device, limit) in enumerate(zip(cluster.devices, search.limits, strict=True))
            for kind in (cluster.kind_of(i),)
        ),
        lab=cluster.lab,
        degrees=best.candidate.degrees,
        sequences=best.step.layout.sequences,
        tokens=best.step.layout.tokens,
        layers=tuple(best.plans),
        stored_layers=search.stored,
        offload=Offload(folder=folder_of(cluster), places=places, foresight=foresight) if places else None,
        routing=source,
        predicted=prediction,
        solver=SolverRecord(status=status, objective=objective, bound=bound, gap=gap, space=space(search)),
        placements=placed,
        solve_seconds=time.perf_counter() - started,
        baselines={name: _baseline_seconds(search, name) for name in BASELINES},
        candidates=tuple(choice.candidate for choice in search.choices),
        notes=(*notes, *final.beyond.notes(model, search.costs.asked, search.workload, dtype)),
        seed=search.seed,
        digests=digests,
        probes=probe_points(cluster, model, dtype),
        profile_load=cluster.provenance.load,
    )


def _routing(trace: Trace | None, model: Model, workload: Workload, seed: int) -> Routing:
    """Token by token, or a sample of the tokens where they choose too often."""
    moe = model.moe_block().moe
    assert moe is not None
    choices = workload.tokens * len(model.moe_layers) * moe.top_k
    if choices <= MOST_CHOICES:
        return draw_routing(trace, model, workload, seed)
    return sample_routing(trace, model, workload, seed, SAMPLED_CHOICES)


def _check_arguments(dtype: str, memory_bytes: int | None, time_limit: float) -> None:
    if dtype not in DTYPE_BYTES:
        raise MoeplanError(f"dtype {dtype!r}: expected one of {', '.join(DTYPE_BYTES)}")
    if memory_bytes is not None and memory_bytes <= 0:
        raise MoeplanError(f"memory {memory_bytes}: expected a positive number of bytes")
    if not time_limit > 0:
        raise MoeplanError(f"time limit {time_limit}: expected a positive number of seconds")


def _searched_with_storage(search: Search, shared: bool, beyond: bool) -> Search:
    """What was found with storage for all layers. Where nothing fits: with experts ``beyond`` memory, if there is a
    place for them, else, if layers may share it, with storage for as many as fit.

    Shared storage stands in for a model that the devices cannot hold, so that its step can be timed all the same. It is
    cut down until every strategy that is asked for fits (they are compared under the same conditions), or, where one
    never does, until any fits.
    """
    offloaded = search.whole == ("offload",)
    if beyond and not search.fits(None):
        search = replace(search, strategies=(), whole=("offload",))
    elif not offloaded and not search.fits(None) and shared:
        counts = [s for s in range(search.stored, 0, -1) if _repeats(search.model, s)]
        search = (
            _most_stored(search, counts[1:], search.strategies or ["coherent"])
            or _most_stored(search, counts[1:], [None])
            or replace(search, stored=counts[-1])
        )
    search.run()
    if _best(search) is None:
        raise InfeasibleError(_shortage(search, shared))
    return search


def _most_stored(search: Search, counts: list[int], strategies: Sequence[Strategy | None]) -> Search | None:
    """The first of the falling ``counts`` of stored layers for which each of the strategies fits; by halving."""
    low, high = 0, len(counts)
    while low < high:  # counts[high:] fit
        middle = (low + high) // 2
        attempt = replace(search, stored=counts[middle])
        if all(attempt.fits(strategy) for strategy in strategies):
            high = middle
        else:
            low = middle + 1
    return replace(search, stored=counts[high]) if high < len(counts) else None


def _repeats(model: Model, stored: int) -> bool:
    """Whether layer i can use the storage of layer i % stored: they must be alike."""
    layers = [block.dequantised() for block in model.layers]  # as the runtime holds them
    return all(block == layers[i % stored] for i, block in enumerate(layers))


def _best(search: Search) -> Choice | None:
    """The fastest alternative that fits, of several equals the first (single strategies come before mixtures).

    The baselines are among them where what they do is searched.
    """
    searched = "ep" in search.strategies and search.given is None
    allowed = [
        choice
        for choice in search.choices
        if choice.candidate.step_seconds is not None and (choice.candidate.name not in BASELINES or searched)
    ]
    return min(allowed, key=lambda choice: choice.candidate.step_seconds or 0.0, default=None)


def _baseline_seconds(search: Search, name: str) -> float:
    """A baseline is predicted even where it does not fit: it is what the plan is compared with."""
    choice = next(choice for choice in search.choices if choice.candidate.name == name)
    return choice.seconds


def _shortage(search: Search, shared: bool) -> str:
    """How much is missing on which device, in the space that comes closest."""
    if search.given is not None:
        return _placement_shortage(search, search.given)
    least = min(search.missing, key=lambda missing: int(missing.sum()), default=np.zeros(0, int))
    what = f"{search.model.name} at {search.workload}"
    if shared:
        stored = "one layer" if search.stored == 1 else f"{search.stored} layers"
        return f"{what} {lacking(least)}, even with weights for {stored} only: use more devices or fewer tokens"
    limit = f"the limit of {bytes_text(search.limits[0])} per device"
    return f"{what} {lacking(least)} at least, beyond {limit}: raise --memory, or leave it out to share layer storage"


def _placement_shortage(search: Search, given: Given) -> str:
    """The same of a given placement, which nothing but other memory makes fit."""
    lacks = []
    for layout in search.layouts.values():
        step = Step(search.costs, search.model, layout, search.routing)
        held = step.memory(given.layers, search.stored, search.limits)
        lacks.append(np.array([max(0, m.total - m.limit) for m in held]))
    least = min(lacks, key=lambda lack: int(lack.sum()))
    return (
        f"{given.name}: with its experts {search.model.name} at {search.workload} {lacking(least)}: place with fewer "
        "--slots or other devices, use fewer tokens, or raise --memory"
    )


def _routing_source(trace: Trace | None, path: str, seed: int) -> RoutingSource:
    if trace is None:
        return RoutingSource(kind="assumed", assumption=ASSUMPTION, seed=seed)
    counts = "independent draws with the trace's expert counts" if trace.counts_only else ""
    return RoutingSource(kind="trace", path=path, digest=trace.digest(), assumption=counts, seed=seed)

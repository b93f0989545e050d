"""What every rank does to run a plan: load its part, step, measure, and check the output."""

import gc
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..spec import Model, MoeplanError, Plan, Trace
from ..spec.operators import Part
from ..spec.routing import Routing, check_shape, draw_routing
from .check import checked_layers, first_layers, planned_output, reference_output, relative_error
from .checkpoint import Checkpoint
from .coherent import executor_of
from .devices import verify_devices
from .executor import DTYPES, Executor, Output
from .families.checkpoint import FamilyCheckpoint
from .families.net import build
from .families.source import FamilyWeights
from .families.weights_check import check_family_weights
from .launch import Rank
from .launch.rank import resolve_entry
from .load import LoadMeter
from .memory import PeakMemory, available_bytes, keep_freed_memory, return_freed_memory
from .random_weights import RandomWeights, random_tensor
from .router import Chooser, choose
from .selected import COMPARED_STEPS, Selecting
from .selection import Selector
from .timers import Timers
from .weights import WeightSource
from .weights_check import check_weights

if TYPE_CHECKING:
    from .families.execute import FamilyExecutor


LEAST_REPETITIONS, LEAST_TIME = 30, 6.0  # steps, or seconds of them: processors that others share vary over seconds
MOST_REPETITIONS = 300
SAY_EVERY = 1.0  # seconds: whoever listens does so on the processors that are measured
WARM_UP_SHARE = 0.25  # of the budget: a second warm-up step if the first took less


@dataclass(frozen=True)
class Job:
    """What ``run`` asks of the ranks; JSON. ``probe``: the entry that times the plan's probes, if wanted; ``timeline``:
    whether the laps of a step are; ``select``: a selection of experts to compare, with the tokens ``prompts`` of every
    sequence, the context, ``COMPARED_STEPS`` and one more."""

    plan: str
    trace: str | None
    weights_folder: str | None
    repetitions: int | None
    step_budget: float
    check_budget: float
    own_routing: bool = False
    probe: str | None = None
    timeline: bool = False
    select: str | None = None
    prompts: list[list[int]] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run_plan(rank: Rank, job: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up, measure, check.

    Result (JSON): ``steps`` [seconds of each repetition], ``parts`` [{layer, part, seconds of each repetition}],
    ``laps`` of the median step [[layer, part, begin, end]] where they are wanted, ``reads`` of a step (``Needs``; empty
    where nothing rests outside memory), ``load`` during the steps,
    ``probes`` [before the steps, after them] seconds of each, ``memory`` peak bytes, ``environment``, and on rank 0
    ``check`` {layers, error} or None where it does not fit, and ``weights``, see ``check_weights``, or None without a
    checkpoint. With a selection of experts also ``selected`` [seconds of each repetition], ``compared``, see
    ``compare_outputs``, and in ``check`` ``selected_error``, None in low precision.
    Raises MoeplanError for another trace, or devices other than the plan's.
    """
    return_freed_memory()
    task = Job(**job)
    plan = Plan.parse(task.plan, "plan")
    verify_devices(plan, rank.seated())
    torch.set_num_threads(plan.devices[rank.rank].threads)
    routing = None
    if not task.own_routing:
        routing = draw_routing(planned_trace(plan, task.trace), plan.model, plan.workload, plan.routing.seed)
    probes = [run_probe(rank, task, plan)]
    if plan.model.family_config is not None:
        build(plan.model, DTYPES[plan.dtype])  # Transformers' code is loaded now: it is no part of what is measured
    memory, workload = PeakMemory(rank.device), plan.workload

    begin = perf_counter()
    rank.emit({"what": "loading weights"})
    source = weight_source(plan, plan.model, task.weights_folder, rank.device)
    more = COMPARED_STEPS if task.select else workload.length
    executor = executor_of(plan, rank.rank, source, device=rank.device, capacity=workload.context + more)
    executor.cache.fill(workload.context, plan.seed)
    inputs = step_inputs(plan).to(rank.device)
    selecting = None
    if task.select:
        assert isinstance(executor, Executor)  # ``run`` has refused others
        selecting = Selecting.of(plan, executor, task.select, task.prompts)
    load_seconds = agree(perf_counter() - begin, rank.device)
    keep_freed_memory()
    rank.emit({"what": "warming up"})

    measured = measure(executor, inputs, routing, task, plan, rank, selecting)
    if selecting:
        rank.emit({"what": f"comparing the output of {task.select}"})
        measured |= {"compared": selecting.compare()}
        executor.cache.fill(workload.context, plan.seed)  # the check's own
    peak = memory.bytes()
    probes.append(run_probe(rank, task, plan))

    layers = layers_to_check(plan, task.check_budget, peak, max(measured["steps"]), load_seconds, rank)
    rank.emit({"what": f"checking {layers} of {len(plan.model.layers)} layers"})
    check = None
    if layers:
        if routing is None and plan.dtype != "f32":
            # A router's close call may go either way in low precision: the check compares the same choices.
            routing = draw_routing(planned_trace(plan, task.trace), plan.model, plan.workload, plan.routing.seed)
        cases = check_cases(routing, selecting, plan)
        outputs = [
            planned_output(executor, inputs, case.routing, workload.context, layers, case.on_ranks)
            for case in cases.values()
        ]
        del executor, source, selecting
        gc.collect()
        dist.barrier()
        if rank.rank == 0:
            source = weight_source(plan, first_layers(plan.model, layers), task.weights_folder, rank.device)
            errors = compare_with_reference(plan, source, inputs, cases, outputs)
            check = {"layers": layers, **errors}
    weights = None
    if task.weights_folder and rank.rank == 0:
        rank.emit({"what": "checking the weights"})
        folder = Path(task.weights_folder)
        if plan.model.family_config is not None:
            weights = check_family_weights(plan.model, folder, plan.seed)
        else:
            weights = check_weights(plan.model, folder, max(layers, 1), plan.seed)
    found = {"probes": probes, "memory": peak, "check": check, "weights": weights}
    return {**measured, **found, "environment": environment(rank)}


def layers_to_check(plan: Plan, budget: float, peak: int, step_seconds: float, load_seconds: float, rank: Rank) -> int:
    """Layers that all ranks compare with the reference: as many as rank 0 has time and memory for."""
    step_seconds = agree(step_seconds, rank.device)
    free = available_bytes(rank.device) + peak  # what the executor holds is freed first
    layers = checked_layers(plan, budget, free, step_seconds, load_seconds) if rank.rank == 0 else 0
    return int(agree(layers, rank.device))


class CheckCase(NamedTuple):
    """A step that is compared with the reference: its routing, or who chooses on the ranks and in the reference."""

    routing: Routing | None
    on_ranks: Chooser = choose
    alone: Chooser = choose


def check_cases(routing: Routing | None, selecting: Selecting | None, plan: Plan) -> dict[str, CheckCase]:
    """The step as it is, and with the selection; in low precision close calls of it may go either way for a whole
    batch, so that it is left out."""
    cases = {"error": CheckCase(routing)}
    if selecting and plan.dtype == "f32":
        cases["selected_error"] = CheckCase(None, selecting.selector, Selector(selecting.selector.selection))
    return cases


def compare_with_reference(
    plan: Plan, source: WeightSource | FamilyWeights, inputs: Tensor, cases: dict[str, CheckCase], outputs: list[Output]
) -> dict[str, float]:
    """Relative error of each case's output of the ranks."""
    wanted = [reference_output(plan, source, inputs, case.routing, case.alone) for case in cases.values()]
    return dict(zip(cases, map(relative_error, outputs, wanted), strict=True))


def run_probe(rank: Rank, task: Job, plan: Plan) -> list[float]:
    """Seconds of each of the plan's probes now; none where they are not wanted or memory is short."""
    if task.probe is None or not plan.probes:
        return []
    rank.emit({"what": "comparing the machine with its profile"})
    return resolve_entry(task.probe)(rank, {"plan": task.plan})["seconds"]


def planned_trace(plan: Plan, path: str | None) -> Trace | None:
    """The trace that the plan was made from, at ``path`` or where the plan says; None where it had none."""
    path = path or plan.routing.path
    if not path:
        if plan.routing.kind == "trace":
            raise MoeplanError("the plan was made from a trace that was in no file: give the trace (--trace)")
        return None
    trace = Trace.read(path)
    check_shape(trace, plan.model, path)
    found, wanted = trace.digest(), plan.routing.digest
    if found != wanted:
        raise MoeplanError(f"{path}: not the trace that the plan was made for (digest {found}, plan's {wanted})")
    return trace


def weight_source(plan: Plan, model: Model, folder: str | None, device: torch.device) -> WeightSource | FamilyWeights:
    """``model``'s weights in the plan's dtype: a checkpoint's, or random ones with the plan's storage."""
    if model.family_config is not None:
        if folder:
            return FamilyCheckpoint(plan.model, model, folder, DTYPES[plan.dtype], device)
        stored = min(plan.stored_layers, len(plan.model.layers))
        return FamilyWeights(model, DTYPES[plan.dtype], plan.seed, device, stored)
    if folder:
        return Checkpoint(model, folder, DTYPES[plan.dtype], device)
    stored = min(plan.stored_layers, len(model.layers))
    return RandomWeights(model, DTYPES[plan.dtype], plan.seed, device, stored)


def step_inputs(plan: Plan) -> Tensor:
    """All tokens of the step: random ids [tokens], or hidden states [tokens, D] for a model without a vocabulary."""
    model, tokens = plan.model, plan.workload.tokens
    if model.vocab_size:
        return torch.from_numpy(np.random.default_rng(plan.seed).integers(model.vocab_size, size=tokens))
    hidden = torch.empty(tokens, model.layers[0].hidden_size, dtype=DTYPES[plan.dtype])
    return random_tensor(hidden, plan.seed, 0, "inputs", fan_in=1)


def agree(value: float, device: torch.device) -> float:
    """The largest of the ranks' values."""
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.item()


def measure(
    executor: "Executor | FamilyExecutor",
    inputs: Tensor,
    routing: Routing | None,
    task: Job,
    plan: Plan,
    rank: Rank,
    selecting: Selecting | None = None,
) -> dict[str, Any]:
    """Steps after a warm-up, each from a barrier: seconds of each step, and of each part in each step, on this rank.

    Without ``routing`` the model's routers choose. With ``selecting`` its tokens are processed, and after every step
    one that selects.
    """
    layout, timers, context = executor.layout, Timers(rank.device), plan.workload.context
    inputs = selecting.tokens[:, 0] if selecting else inputs
    own, forced = inputs[layout.own], executor.forced(routing, layout) if routing else None
    steps: list[float] = []
    selected: list[float] = []
    parts: list[dict[tuple[int, Part], float]] = []
    laps: list[list[tuple[int, Part, float, float]]] = []

    def step(chooser: Chooser = choose) -> float:
        dist.barrier()
        synchronize(rank.device)
        begin = perf_counter()
        timers.start()
        executor.step(own, layout, context, forced=forced, timers=timers, chooser=chooser)
        synchronize(rank.device)
        return perf_counter() - begin

    seconds = agree(step(), rank.device)
    if seconds < WARM_UP_SHARE * task.step_budget:  # the first step also pays for what is made once
        seconds = agree(step(), rank.device)
    if selecting:
        seconds += agree(step(selecting.selector), rank.device)
    meter = LoadMeter()
    count = task.repetitions or repetitions(seconds, task.step_budget)
    said, before = 0.0, executor.reads()
    for i in range(count):
        steps.append(step())
        parts.append(timers.seconds())
        if task.timeline:
            laps.append(timers.laps())
        if selecting:
            selected.append(step(selecting.selector))
        if i + 1 == count or perf_counter() - said > SAY_EVERY:
            said = perf_counter()
            rank.emit({"done": i + 1, "of": count, "what": f"step {i + 1}: {steps[-1]:.3g} s"})
    return {
        "steps": steps,
        "selected": selected,
        "load": meter.whole().model_dump(mode="json"),
        "parts": [{"layer": i, "part": part, "seconds": [p[i, part] for p in parts]} for i, part in parts[0]],
        "laps": laps[usual_step(steps, rank.device)] if task.timeline else [],
        "reads": [(now - then) / count for now, then in zip(executor.reads(), before, strict=True)],
    }


def usual_step(steps: list[float], device: torch.device) -> int:
    """The step of median duration, of all ranks together: a step lasts as long as on its slowest rank."""
    together = torch.tensor(steps, dtype=torch.float64, device=device)
    dist.all_reduce(together, op=dist.ReduceOp.MAX)
    return int(together.argsort()[len(steps) // 2])


def repetitions(seconds: float, budget: float) -> int:
    """How many steps of so many seconds are timed within the budget: enough of them, for long enough."""
    wanted = min(max(LEAST_REPETITIONS, int(LEAST_TIME / seconds)), MOST_REPETITIONS)
    return max(1, min(wanted, int(budget / seconds)))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment(rank: Rank) -> dict[str, str]:
    cuda = rank.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "backend": dist.get_backend(),
        "device": torch.cuda.get_device_name(rank.device) if cuda else platform.machine(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }

"""Run a plan on its devices and report what it did cost, part by part, against its prediction."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import gmean

from ..spec import MoeplanError, Plan, Report
from ..spec.load import Load, note, worst
from ..spec.report import (
    Comparison,
    ExpertsUsed,
    Lap,
    Machine,
    NumericalCheck,
    PartComparison,
    ProbeComparison,
    Reads,
    SelectionReport,
    WeightsCheck,
)
from ..spec.selection import Selection
from .check import TOLERANCE
from .checkpoint import Checkpoint
from .devices import verify_devices
from .families.checkpoint import FamilyCheckpoint
from .launch import Launcher
from .selected import COMPARED_STEPS, check_prompts
from .worker import Job, planned_trace, weight_source

ENTRY = "moeplan.runtime.worker:run_plan"
EXCHANGING = ("dispatch", "gather", "combine")  # parts whose time is mostly messages'
STEP_BUDGET, CHECK_BUDGET = 45.0, 30.0  # seconds


@dataclass(frozen=True)
class Selected:
    """A selection that a user asks for.

    budget: largest divergence of the output that passes, in nats. prompts: tokens of the file ``text`` [sequences,
    context + COMPARED_STEPS + 1]; without them random ones.
    """

    selection: Selection
    budget: float
    prompts: list[list[int]] | None = None
    text: str = ""

    def check(self, plan: Plan) -> None:
        """Raise MoeplanError where it makes no sense for the plan."""
        self.selection.check(plan.model, plan.workload)
        if self.prompts is not None:
            length = plan.workload.context + COMPARED_STEPS + 1
            check_prompts(plan.model, self.prompts, plan.workload.sequences, length)


def run(
    plan: Plan,
    launcher: Launcher,
    *,
    trace: Path | None = None,
    weights_folder: Path | None = None,
    own_routing: bool = False,
    tolerance: float = 0.25,
    repetitions: int | None = None,
    step_budget: float = STEP_BUDGET,
    check_budget: float = CHECK_BUDGET,
    timeout: float = 300.0,
    probe: str | None = None,
    timeline: bool = False,
    selecting: Selected | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Report:
    """Execute ``plan``'s step on its devices.

    trace: the file that the plan was made from, if it lies elsewhere now. weights_folder: a Hugging Face checkpoint;
    random weights without it. own_routing: the model's routers choose, instead of the routing that the plan was made
    for. tolerance: largest |predicted - measured| / measured of the step that passes.
    repetitions: timed steps (default: 30, or 6 seconds of them, as far as they fit ``step_budget`` seconds).
    check_budget: seconds that the reference may take; it computes fewer layers of large models.
    timeout: seconds without a sign of life.
    probe: the entry that times the plan's probes before and after the steps (``profiler.PROBE``); none: left out.
    timeline: whether the report has what every device did in the step of median duration.
    selecting: a selection of experts to compare with the model's own routing, which then runs.
    Raises MoeplanError for a plan of other devices or another trace, RunError for a rank that failed.
    """
    if selecting:
        if plan.model.family_config is not None:
            raise MoeplanError(f"--select: {plan.model.name} has Transformers' own routers, which choose as they do")
        selecting.check(plan)
        own_routing = True
    job = Job(
        plan=plan.to_json(),
        trace=str(trace.absolute()) if trace else None,
        weights_folder=str(weights_folder.absolute()) if weights_folder else None,
        repetitions=repetitions,
        step_budget=step_budget,
        check_budget=check_budget,
        own_routing=own_routing,
        probe=probe,
        timeline=timeline,
        select=str(selecting.selection) if selecting else None,
        prompts=selecting.prompts if selecting else None,
    )
    planned_trace(plan, job.trace)  # what can be refused here needs no ranks
    source = weight_source(plan, plan.model, job.weights_folder, torch.device("cpu"))
    if isinstance(source, Checkpoint | FamilyCheckpoint):
        source.check()
    verify_devices(plan, launcher.seated())
    results = launcher.run(ENTRY, job.to_json(), timeout=timeout, on_event=on_event)
    return assemble(plan, results, tolerance, own_routing, selecting)


def assemble(
    plan: Plan,
    results: list[dict[str, Any]],
    tolerance: float,
    own_routing: bool = False,
    selecting: Selected | None = None,
) -> Report:
    """The report of every rank's result, in rank order; see ``worker.run_plan``."""
    # A step lasts as long as its slowest device.
    step = Comparison(**compare(plan.predicted.step_seconds, np.max([r["steps"] for r in results], axis=0)))
    check, found = numerical_check(plan, results[0]["check"]), results[0].get("weights")
    weights, reads = WeightsCheck(**found) if found else None, reads_of([result["reads"] for result in results])
    now = machine(plan, results, step)
    said = *notes(plan, check, own_routing, weights), *reads_note(reads, plan.predicted.reads), *load_notes(now)
    selection = selection_report(plan, results, selecting) if selecting else None
    return Report(
        plan=plan.digest(),
        model=plan.model.name,
        workload=str(plan.workload),
        step=step,
        repetitions=len(results[0]["steps"]),
        parts=part_comparisons(plan, results),
        memory=tuple(r["memory"] for r in results),
        check=check,
        weights=weights,
        tolerance=tolerance,
        passed=abs(step.error) <= tolerance and all(c is None or c.passed for c in (check, weights, selection)),
        notes=(*said, *selection_notes(selection)),
        environment=results[0]["environment"],
        machine=now,
        reads=reads,
        selection=selection,
        timeline=tuple(
            Lap(device=device, layer=layer, part=part, begin=begin, end=end)
            for device, result in enumerate(results)
            for layer, part, begin, end in result["laps"]
        ),
    )


def selection_report(plan: Plan, results: list[dict[str, Any]], selecting: Selected) -> SelectionReport:
    """Steps with the selection beside the others, and their output; see ``worker.run_plan``."""
    exact, selected = (np.max([r[name] for r in results], axis=0) for name in ("steps", "selected"))
    low, ratio, high = np.percentile(exact / selected, (10, 50, 90)).tolist()
    found, result = results[0]["compared"], results[0]["check"]
    used = zip(plan.model.moe_layers, found["used"], strict=True)
    check = None
    if result and "selected_error" in result:
        check = numerical_check(plan, result | {"error": result["selected_error"]})
    return SelectionReport(
        selection=selecting.selection,
        budget=selecting.budget,
        text=selecting.text,
        layers=tuple(ExpertsUsed(layer=i, experts=n, before=was, after=now) for i, (was, now, n) in used),
        exact_seconds=float(np.median(exact)),
        selected_seconds=float(np.median(selected)),
        speedup=ratio,
        speedup_low=low,
        speedup_high=high,
        check=check,
        passed=found["divergence"] <= selecting.budget and (check is None or check.passed),
        **{name: found[name] for name in ("divergence", "changed", "tokens", "perplexity")},
    )


def selection_notes(selection: SelectionReport | None) -> tuple[str, ...]:
    result = []
    if selection and not selection.text:
        result.append("divergence is of random tokens after a random context; --text gives the model something to read")
    if selection and selection.check is None:
        result.append("the selected output was not compared with a reference: only in f32, where the reference fits")
    return tuple(result)


def machine(plan: Plan, results: list[dict[str, Any]], step: Comparison) -> Machine:
    """The load during the steps, and the probes; see ``worker.run_plan``."""
    probes, rounds = [], [r["probes"] for r in results]
    for i, point in enumerate(plan.probes):
        # [ranks, times]: a point lasts as long as its slowest device; before and after the steps count alike.
        seconds = [[times[i] for times in rank if times] for rank in rounds]
        if seconds[0]:
            measured = float(np.mean(np.max(seconds, axis=0)))
            common = {"kind": point.kind, "operator": point.operator, "at": point.at}
            probes.append(ProbeComparison(**common, profiled=max(point.seconds), measured=measured))
    return Machine(
        load=worst([Load.model_validate(r["load"]) for r in results]),
        profile_load=plan.profile_load,
        probes=tuple(probes),
        rescaled=step.model_copy(update={"predicted": rescaled(plan, probes)}) if probes else None,
    )


def load_notes(machine: Machine) -> tuple[str, ...]:
    """Of the steps that were measured beside other programs; of the profile the plan's own notes speak."""
    before = "" if machine.profile_load is None else f" ({machine.profile_load.taken:.0%} during the profile)"
    return note(machine.load, f"while the steps were measured{before}", "run")


def rescaled(plan: Plan, probes: Sequence[ProbeComparison]) -> float:
    """Predicted seconds of the step on the machine as the probes found it.

    Parts that exchange messages are multiplied by what the collective's probe says, all others by the mean of the
    operators' probes; the step by the mean of its parts' factors, weighted with their predicted seconds.
    """
    exchange = [probe.factor for probe in probes if probe.kind == "exchange"]
    compute = [probe.factor for probe in probes if probe.kind != "exchange"]
    by_part: dict[str, float] = {}
    for layer in plan.predicted.layers:
        for part, seconds in layer.parts.items():
            by_part[part] = by_part.get(part, 0.0) + seconds
    total = sum(by_part.values())
    factors = {part: gmean(exchange if part in EXCHANGING and exchange else compute) for part in by_part}
    scale = sum(factors[part] * seconds for part, seconds in by_part.items()) / total if total else 1.0
    return plan.predicted.step_seconds * scale


def compare(predicted: float, measured: np.ndarray) -> dict[str, float]:
    """measured: [repetitions] seconds."""
    low, median, high = np.percentile(measured, (10, 50, 90)).tolist()
    return {"predicted": predicted, "measured": median, "spread": (high - low) / median if median else 0.0}


def part_comparisons(plan: Plan, results: list[dict[str, Any]]) -> tuple[PartComparison, ...]:
    """Every part of every layer that was predicted or measured, means over devices."""
    predicted = {(layer.layer, part): s for layer in plan.predicted.layers for part, s in layer.parts.items()}
    measured: dict[tuple[int, str], list[list[float]]] = {}
    for result in results:
        for entry in result["parts"]:
            measured.setdefault((entry["layer"], entry["part"]), []).append(entry["seconds"])
    nothing = [[0.0] * len(results[0]["steps"])]
    comparisons = []
    for key in sorted(predicted.keys() | measured.keys()):
        seconds = np.sum(measured.get(key, nothing), axis=0) / len(results)
        comparisons.append(PartComparison(layer=key[0], part=key[1], **compare(predicted.get(key, 0.0), seconds)))
    return tuple(comparisons)


def numerical_check(plan: Plan, result: dict[str, Any] | None) -> NumericalCheck | None:
    if result is None:
        return None
    tolerance = TOLERANCE[plan.dtype]
    return NumericalCheck(
        relative_error=result["error"],
        tolerance=tolerance,
        layers=result["layers"],
        tokens=plan.workload.tokens,
        passed=result["error"] <= tolerance,
    )


def reads_of(results: list[list[float]]) -> Reads | None:
    """Of all devices; None where nothing rests outside memory."""
    needed = [Reads(needed=n, listed=early, ahead=a, vain=v, host=h) for n, early, a, v, h in filter(None, results)]
    if not needed:
        return None
    return Reads(**{name: sum(getattr(reads, name) for reads in needed) for name in Reads.model_fields})


def reads_note(reads: Reads | None, expected: Reads | None) -> tuple[str, ...]:
    if reads is None:
        return ()
    note = (
        f"a step needed {reads.needed:.1f} experts from outside memory, {reads.ahead:.1f} of them among the "
        f"{reads.listed:.1f} that were to be read ahead; {reads.vain:.1f} were read in vain"
    )
    if expected is not None:
        note += f" (expected: {expected.needed:g}, {expected.ahead:g}, {expected.listed:g}, {expected.vain:g})"
    if not reads.host:
        return (note,)
    hosted = f"{reads.host:.1f} experts more were computed by the hosts' processors, where they rest"
    return note, hosted if expected is None else f"{hosted} (expected: {expected.host:g})"


def notes(
    plan: Plan, check: NumericalCheck | None, own_routing: bool, weights: WeightsCheck | None = None
) -> tuple[str, ...]:
    layers, result = len(plan.model.layers), []
    if plan.stored_layers < layers:
        result.append(f"{layers} layers share the weights of {plan.stored_layers}: memory does not hold them all")
    if check is None:
        result.append("output not checked: the reference does not fit the memory of one device")
    elif check.layers < layers:
        result.append(f"output checked after {check.layers} of {layers} layers: the reference's time is limited")
    if weights is not None and weights.reason:
        result.append(f"weights not compared with Transformers' own loading: {weights.reason}")
    if own_routing:
        result.append("the model's own routing ran, the prediction is for the plan's")
    elif plan.routing.kind == "assumed":
        result.append(f"routing assumed: {plan.routing.assumption}")
    return tuple(result)

"""Why this plan: tables of the candidates, of where the step's time goes, and of memory. Nothing is printed here."""

from collections import Counter
from collections.abc import Mapping, Sequence

from rich import box
from rich.text import Text

from ...planner.units import bytes_text, seconds_text
from ...spec.operators import PARTS
from ...spec.plan import STRATEGIES, Candidate, LayerPlan, Plan
from .tables import WholeTable

SHOWN = 8  # candidates, and kinds of devices; the plan holds all
FOLDED = 16  # devices up to which each has a row of its own


def candidates_table(plan: Plan) -> WholeTable:
    """Candidates by predicted step time, with the best of every kind; those that do not fit come last."""
    ranked = _distinct(plan)
    routing = ", routing assumed" if plan.routing.kind == "assumed" else ""
    table = _table(f"{plan.model.name}, {plan.workload}, {plan.dtype}{routing}: candidates by predicted step time")
    for name in ("candidate", "tensor x data", "expert", "tokens"):
        table.add_column(name)
    table.add_column("step", justify="right")
    table.add_column("vs best", justify="right")
    best_of_kind: dict[str, Candidate] = {}
    for candidate in ranked:
        best_of_kind.setdefault(_kind(candidate), candidate)
    others = [c for c in ranked if c not in best_of_kind.values()]
    shown = [*best_of_kind.values(), *others[: max(0, SHOWN - len(best_of_kind))]]
    for candidate in ranked:
        if candidate in shown:
            table.add_row(*_candidate_row(candidate, plan))
    if len(ranked) > len(shown):
        table.caption = f"{len(ranked) - len(shown)} more in the plan"
    return table


def _distinct(plan: Plan) -> list[Candidate]:
    """Ranked candidates without mixtures that came out as one strategy, which have a row of their own."""
    pure = [c for c in plan.candidates if not (c.name.startswith("mixed") and len(c.strategies) == 1)]
    return sorted(pure, key=lambda c: (c.step_seconds is None, c.step_seconds or 0.0))


def _kind(candidate: Candidate) -> str:
    """The name without the layout, which has columns of its own."""
    return candidate.name.split(" (")[0]


def _candidate_row(candidate: Candidate, plan: Plan) -> list[str]:
    name, degrees = _kind(candidate), candidate.degrees
    if len(candidate.strategies) > 1:
        name += f": {strategies_text(candidate.strategies)}"
    even = len(set(candidate.tokens)) == 1
    tokens = f"{candidate.tokens[0]} each" if even else _tokens_text(candidate.tokens)
    row = [name, f"{degrees.tensor} x {degrees.data}", str(degrees.expert), tokens]
    if candidate.step_seconds is None:
        return [*row, "-", "does not fit"]
    return [*row, seconds_text(candidate.step_seconds), f"{candidate.step_seconds / plan.solver.objective - 1:+.1%}"]


def _tokens_text(tokens: Sequence[int]) -> str:
    """A number per device; where they are many, the least and the most."""
    if len(tokens) > FOLDED:
        return f"{min(tokens)} to {max(tokens)}"
    return " ".join(map(str, tokens))


def strategies_text(strategies: Mapping[str, int]) -> str:
    """Layers by strategy, as in `20 ep, 12 sharded`."""
    return ", ".join(f"{strategies[s]} {s}" for s in STRATEGIES if s in strategies)


def layers_text(layers: Sequence[LayerPlan]) -> str:
    """The same with the chunks of each, as in `20 ep in 4 chunks, 12 sharded`, and how many have an order of their
    own."""
    forms = Counter((STRATEGIES.index(layer.strategy), layer.chunks) for layer in layers)
    own = Counter((STRATEGIES.index(layer.strategy), layer.chunks) for layer in layers if layer.order is not None)
    return ", ".join(
        f"{count} {STRATEGIES[form[0]]}"
        + (f" in {form[1]} chunks" if form[1] > 1 else "")
        + (f" ({own[form]} in an order of their own)" if own[form] else "")
        for form, count in sorted(forms.items())
    )


def breakdown_table(plan: Plan) -> WholeTable:
    """Seconds of each part, summed over the layers (mean over devices, waiting in the part that waits)."""
    totals = dict.fromkeys(PARTS, 0.0)
    for layer in plan.predicted.layers:
        for part, seconds in layer.parts.items():
            totals[part] += seconds  # type: ignore[index]
    whole = sum(totals.values())
    table = _table("predicted step, part by part")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    for part, seconds in totals.items():
        if seconds > 0:
            table.add_row(part, seconds_text(seconds), f"{seconds / whole:.1%}", "█" * round(30 * seconds / whole))
    table.add_section()
    table.add_row("step", seconds_text(plan.predicted.step_seconds), "", "")
    return table


def memory_table(plan: Plan) -> WholeTable:
    """Predicted bytes on each device, and what is left below its limit."""
    title = "memory per device"
    if plan.model.stored_in():
        title += f", weights dequantised to {plan.dtype}"
    table = _table(title, padding=0)  # so that its seven columns fit 80 characters
    table.add_column("device")
    for name in ("weights", "gathered", "cache", "activations", "limit", "headroom"):
        table.add_column(name, justify="right")
    rows = []
    for device, memory in zip(plan.devices, plan.predicted.memory, strict=True):
        sizes = (memory.weights, memory.gathered, memory.cache, memory.activations, memory.limit)
        headroom = f"{bytes_text(memory.limit - memory.total)} ({1 - memory.total / memory.limit:.0%})"
        rows.append((device.host, *map(bytes_text, sizes), headroom))
    if len(rows) <= FOLDED:
        for i, (host, *own) in enumerate(rows):
            table.add_row(f"{i} on {host}", *own)
        return table
    # Of many devices one row for all that read alike, those with the least headroom first.
    alike: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        alike.setdefault(row[1:], []).append(i)
    free = [memory.limit - memory.total for memory in plan.predicted.memory]
    ordered = sorted(alike.items(), key=lambda entry: min(free[i] for i in entry[1]))
    for cells, devices in ordered[:SHOWN]:
        table.add_row(f"{len(devices)} devices" if len(devices) > 1 else str(devices[0]), *cells)
    if len(ordered) > SHOWN:
        table.caption = f"{sum(len(devices) for _, devices in ordered[SHOWN:])} more devices in the plan"
    return table


def verdict(plan: Plan) -> Text:
    """The gain over what a user would do by hand, and the proof."""
    record, text = plan.solver, Text()
    layers = layers_text(plan.layers)
    routing = " (routing assumed)" if plan.routing.kind == "assumed" else ""
    text.append(f"step {seconds_text(record.objective)}{routing}: {layers}\n", style="bold")
    for name, seconds in plan.baselines.items():
        reason = next((c.reason for c in plan.candidates if c.name == name), "")
        text.append(f"{_beside(record.objective, seconds)} {name} ({seconds_text(seconds)})")
        text.append(f", which {reason}\n" if reason else "\n")
    if plan.placements:
        who = ", ".join(f"{len(placed.layers)} {placed.method}" for placed in plan.placements)
        gap = max(placed.gap for placed in plan.placements)
        sure = f"at most {100 * gap:.2g} % of what each minimised could be saved" if gap else "each proven best"
        text.append(f"experts placed (layers): {who}; {sure}\n")
    if record.status == "time_limit":
        saved = f"cut short, other plans may be much faster; at most {100 * record.gap:.2g} % could be saved in"
        space = record.space if " combinations, " in record.space else f"the searched space: {record.space}"
        text.append(f"{saved} {space}")
        return text
    proof = "optimal" if record.status == "optimal" else f"at most {100 * record.gap:.2g} % could be saved"
    text.append(f"{proof} in the searched space: {record.space}")
    return text


def _beside(own: float, other: float) -> str:
    if own < other:
        return f"{other / own:.2f}x faster than"
    return "the same as" if own == other else f"{own / other:.2f}x slower than"


def _table(title: str, padding: int | tuple[int, int] = (0, 1)) -> WholeTable:
    return WholeTable(title=title, box=box.SIMPLE_HEAD, padding=padding)

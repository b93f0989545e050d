"""The page of a ServingPlan: replicas, memory, what it is compared with. Nothing is printed here."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ...spec.serving import FrontPoint, Replicas, ServingDegrees, ServingPlan

GIB = 2**30
TITLES = {"vllm": "vLLM", "sglang": "SGLang", "tensorrt-llm": "TensorRT-LLM"}
ROLES = {"both": "", "prefill": "prefill: ", "decode": "decode: "}


def page(plan: ServingPlan) -> Group:
    """What is served how, and what it is predicted to do."""
    parts: list[RenderableType] = [_replicas(plan), _memory(plan)]
    if plan.baselines:
        parts.append(compared(plan))
    return Group(*parts, Text(verdict(plan)))


def explained(plan: ServingPlan) -> Group:
    """The plan, what it is compared with, the front, and what was left out."""
    refused = _table("forms left out", "reason", "", "forms")
    for reason, count in list(plan.solver.refused.items())[:12]:
        refused.add_row(reason, "", str(count))
    parts: list[RenderableType] = [page(plan)]
    parts += [front_table(plan)] if plan.front else []
    parts += [refused] if plan.solver.refused else []
    return Group(*parts, Text(_limit(plan)))


def _limit(plan: ServingPlan) -> str:
    """What stands in the way of more."""
    tight = [(s.memory.total / s.memory.limit, s) for r in plan.replicas for s in r.stages]
    part, stage = max(tight, key=lambda pair: pair[0])
    uneven = [r for r in plan.replicas if len({s.layers for s in r.stages}) > 1]
    said = [f"fullest: {stage.kind} with {part:.0%} of what may be used of its memory"]
    for r in uneven:
        said.append(f"layers go as {' and '.join(f'{s.layers} to {s.kind}' for s in r.stages)}, by time and memory")
    return "; ".join(said)


def degrees(d: ServingDegrees) -> str:
    """Those that are not 1."""
    whole = d.moe_tp == 1 or d.moe_ep == 1  # then one of them says both
    found = {"tp": d.tp, "dp": d.dp, "moe_tp": 1 if whole else d.moe_tp, "ep": d.moe_ep, "pp": d.pp}
    return " ".join(f"{name} {value}" for name, value in found.items() if value > 1) or "one GPU"


def stages(replicas: Replicas) -> str:
    """GPUs of the stages with their layers."""
    if len(replicas.stages) == 1:
        return f"{replicas.stages[0].gpus} x {replicas.stages[0].kind}"
    return " | ".join(f"{stage.gpus} x {stage.kind}: {stage.layers} layers" for stage in replicas.stages)


def _table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < 2 else "right")
    return table


def _replicas(plan: ServingPlan) -> Table:
    title = f"{plan.model} in {plan.precision}, {plan.load}, {TITLES[plan.engine]}"
    table = _table(title, "replicas", "on", "in flight", "share", "TTFT ms", "TPOT ms", "tokens/s", "per GPU")
    for r in plan.replicas:
        name = f"{r.count} x {ROLES[r.role]}{degrees(r.degrees)}"
        ttft = f"{r.each.ttft_s * 1e3:,.0f}" if r.role != "decode" else "-"
        rest = ["-"] * 3
        if r.role != "prefill":
            each = r.each
            rest = [
                f"{each.tpot_s * 1e3:.2f}",
                f"{each.tokens_per_s * r.count:,.0f}",
                f"{each.tokens_per_s_per_gpu:,.1f}",
            ]
        table.add_row(name, stages(r), str(r.concurrency), f"{r.share:.0%}", ttft, *rest)
    return table


def _memory(plan: ServingPlan) -> Table:
    table = _table("GiB on each GPU", "replica", "stage", "weights", "cache", "buffers", "overhead", "of")
    for r in plan.replicas:
        for stage in r.stages:
            m = stage.memory
            values = (m.weights, m.cache, m.activations, m.overhead, m.limit)
            name = f"{ROLES[r.role]}{degrees(r.degrees)}"
            table.add_row(name, f"{stage.kind}, {stage.layers} layers", *(f"{value / GIB:.1f}" for value in values))
    return table


def compared(plan: ServingPlan) -> Table:
    """This plan beside simpler choices."""
    table = _table("compared with", "choice", "", "tokens/s", "GPUs", "this plan")
    table.add_row("this plan", "", f"{plan.predicted.tokens_per_s:,.0f}", str(plan.gpus), "")
    for other in plan.baselines:
        times = f"x {plan.predicted.tokens_per_s / other.tokens_per_s:.2f}" if other.tokens_per_s else "-"
        table.add_row(other.name, "", f"{other.tokens_per_s:,.0f}", str(other.gpus), times)
    return table


def front_table(plan: ServingPlan, most: int = 12) -> Table:
    """The front of one replica; of a long one some points, the ends among them."""
    table = _table(
        "one replica: what no other form beats", "degrees", "on", "in flight", "TPOT ms", "TTFT ms", "per GPU"
    )
    for point in _some(plan.front, most):
        name = f"{TITLES[point.engine]}: {degrees(point.degrees)}"
        on = ", ".join(dict.fromkeys(point.kinds))
        each = point.each
        table.add_row(
            name,
            on,
            str(point.concurrency),
            f"{each.tpot_s * 1e3:.2f}",
            f"{each.ttft_s * 1e3:,.0f}",
            f"{each.tokens_per_s_per_gpu:,.1f}",
        )
    return table


def _some(points: tuple[FrontPoint, ...], most: int) -> list[FrontPoint]:
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def verdict(plan: ServingPlan) -> str:
    p, s = plan.predicted, plan.solver
    limits = [f"TTFT {plan.ttft_limit_s * 1e3:g} ms"] if plan.ttft_limit_s else []
    limits += [f"TPOT {plan.tpot_limit_s * 1e3:g} ms"] if plan.tpot_limit_s else []
    within = f" within {' and '.join(limits)}" if limits else ""
    proven = "proven best" if s.status == "optimal" else "best found in time"
    return (
        f"{p.tokens_per_s:,.0f} tokens/s ({plan.requests_per_s:.3g} requests/s) "
        f"on {plan.gpus} of {plan.gpus_there} GPUs, "
        f"{p.tokens_per_s_per_gpu:,.1f} per GPU; slowest replica: TTFT {p.ttft_s * 1e3:,.0f} ms, "
        f"TPOT {p.tpot_s * 1e3:.2f} ms{within}; {proven} among {s.offers:,} offers of {s.forms} forms"
    )

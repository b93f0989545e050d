"""``moeplan compare``: two placements side by side."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.text import Text

from ...planner.place.compare import MEASURES, PARTS, Comparison
from ...planner.place.compare import compare as between
from ...planner.units import bytes_text
from ...spec.placement import Placement
from ...spec.trace import Trace
from ..console import note, out, print_json
from ..pages.tables import WholeTable
from .explain import read_placement


def compare(
    a: Annotated[Path, typer.Argument(help="A: what `moeplan place` wrote.")],
    b: Annotated[Path, typer.Argument(help="B: another placement of the same layers, experts and device count.")],
    trace: Annotated[Path | None, typer.Option(help="Routing (.npz) to score both on; by default their own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Two placements side by side: scores, which is better in what, and what must be loaded to go from A to B.

    Example: `moeplan compare old.json new.json --trace today.npz`
    """
    first, second = read_placement(a), read_placement(b)
    found = between(first, second, _trace(first, second, trace))
    if as_json:
        documents = {"a": _summary(a, first), "b": _summary(b, second)}
        print_json({"documents": documents, **found.to_dict()})
        return
    out.print(_documents(a, first, b, second), _scores(found), _moves(second, found))
    for sentence in found.verdict:
        out.print(Text(sentence, style="bold"), soft_wrap=True)
    for known in found.notes:
        note(known)


def _trace(a: Placement, b: Placement, given: Path | None) -> Trace | None:
    """The one given, or the one that both name, if it is still there; None: the documents' own scores must do."""
    if given is not None:
        return Trace.read(given)
    if a.trace.digest and a.trace.digest == b.trace.digest:
        for path in (a.trace.path, b.trace.path):
            if os.path.exists(path) and (trace := Trace.read(path)).digest() == a.trace.digest:
                return trace
    return None


def _documents(a: Path, first: Placement, b: Path, second: Placement) -> WholeTable:
    table = _table("")
    for name in ("", f"A: {a.name}", f"B: {b.name}"):
        table.add_column(Text(name))
    for row in zip(*(_described(p) for p in (first, second)), strict=True):
        table.add_row(row[0][0], Text(row[0][1]), Text(row[1][1]))
    return table


def _summary(path: Path, p: Placement) -> dict[str, Any]:
    """What a reader of the JSON needs to know of a document beside its scores."""
    fields = {"model", "num_experts", "objective", "movement", "share_rule", "groups", "balance_cap", "solver", "trace"}
    sizes = {"layers": len(p.layers), "devices": len(p.devices), "slots": sum(d.capacity for d in p.devices)}
    return {"file": str(path), **sizes, **p.model_dump(mode="json", include=fields)}


def _described(p: Placement) -> list[tuple[str, str]]:
    slots = [device.capacity for device in p.devices]
    each = f"{slots[0]} each" if len(set(slots)) == 1 else f"{min(slots)} to {max(slots)}"
    proof = "proven optimal" if p.solver.status == "optimal" else f"gap {p.solver.gap:.1%}"
    return [
        ("model", p.model or "not named"),
        ("devices", f"{len(p.devices)} on {len({d.host for d in p.devices})} hosts"),
        ("slots per layer", f"{sum(slots)} ({each}) for {p.num_experts} experts, {len(p.layers)} layers"),
        ("objective", f"{p.objective}, {p.movement}"),
        ("minimised", p.solver.minimised),
        ("value", f"{p.solver.objective:.6g} ({proof})"),
        ("fitted on", f"{Path(p.trace.path).name or 'an unnamed trace'}, {p.trace.fit[0]:g}:{p.trace.fit[1]:g}"),
    ]


def _scores(found: Comparison) -> WholeTable:
    table = _table("scores, lower is better" + ("" if found.rescored else " (as the documents hold them)"))
    table.add_column("")
    for name in ("A", "B", "B against A", "better"):
        table.add_column(name, justify="right")
    for part, where in PARTS.items():
        rows = [d for d in found.differences if d.part == part]
        if not rows:
            continue
        table.add_section()
        tokens = found.a[part].tokens
        table.add_row(Text(f"{where}" + (f", {tokens:,.0f} tokens" if tokens else ""), style="italic"))
        for d in rows:
            better = "" if d.better == "same" else d.better
            table.add_row(MEASURES[d.measure], f"{d.a:.4g}", f"{d.b:.4g}", f"{d.change:+.1%}", better)
    return table


def _moves(b: Placement, found: Comparison) -> Text:
    changed, copies, layers = sum(found.changed), sum(found.copies), len(found.changed)
    touched = sum(n > 0 for n in found.changed)
    if not changed:
        return Text("A and B hold the same experts on the same devices.\n")
    worst = max(range(layers), key=lambda i: found.changed[i])
    text = Text(f"{changed} of {layers * b.num_experts} experts are on other devices, in {touched} of {layers} layers")
    text.append(f" (most in layer {worst}: {found.changed[worst]} of {b.num_experts}).\n")
    size = f", {bytes_text(found.bytes)} of weights" if found.bytes is not None else ""
    text.append(f"From A to B the devices load {copies} copies{size}.\n")
    per_layer = " ".join(map(str, found.changed))
    return text.append(f"Changed experts by layer: {per_layer}\n", style="dim")


def _table(title: str) -> WholeTable:
    return WholeTable(title=title or None, box=box.SIMPLE_HEAD)

"""``moeplan explain``: why a placement is what it is."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from ...planner.place.explain import Explanation
from ...spec.cluster import Cluster
from ...spec.document import parse_object, read_text
from ...spec.errors import DocumentError, MoeplanError
from ...spec.placement import Placement
from ...spec.serving import ServingPlan
from ...spec.trace import Trace
from .. import where
from ..console import note, out, print_json, say
from ..options import MAX_SEED, picture_option
from ..pages.placement_explained import draw, page


def explain(
    document: Annotated[
        Path, typer.Argument(help="What `moeplan place`, `profile`, `cluster` or, for a served model, `solve` wrote.")
    ],
    trace: Annotated[
        Path | None, typer.Option(help="Of a placement: routing (.npz); by default the one that was fitted.")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Of a cluster: devices that exchange, such as 0-7,12; by default all.")
    ] = None,
    picture: Annotated[
        Path | None, picture_option("Draw load and crossings of a placement, the topology of a cluster, or a front")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the placement with one more slot per device.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a page.")] = False,
) -> None:
    """Say why: what limits a placement, its hottest devices, what crosses, what one more slot would buy; or a cluster.

    Example: `moeplan explain place.json --picture place.png`

    Example: `moeplan explain cluster.json --group 0-7 --picture topology.png`
    """
    text = read_text(document, Placement.hint())  # once: a pipe is empty then
    if parse_object(text, str(document)).get("kind") == Cluster.kind:
        if trace is not None:
            raise MoeplanError(f"--trace goes with a placement, {document} is a cluster: leave it out")
        explain_cluster(Cluster.parse(text, str(document)), group, picture, as_json)
    elif parse_object(text, str(document)).get("kind") == ServingPlan.kind:
        if trace is not None or group is not None:
            raise MoeplanError("--trace and --group say nothing of a served model's plan: leave them out")
        explain_serving(ServingPlan.parse(text, str(document)), picture, as_json)
    else:
        if group is not None:
            raise MoeplanError(f"--group goes with a cluster, {document} is none: leave it out")
        placement = parse_placement(text, str(document))
        explain_placement(placement, trace_of(placement, document, trace), picture, seed, as_json)
    if picture and not as_json:
        say(f"wrote {picture}")


def explain_placement(placement: Placement, trace: Trace, picture: Path | None, seed: int, as_json: bool) -> None:
    """Print why a placement is what it is."""
    explanation = where.explain(placement, trace, seed)
    if picture:
        draw(placement, explanation, picture)
    if as_json:
        print_json(body(placement, explanation))
        return
    out.print(page(placement, explanation))
    for known in explanation.notes:
        note(known)


def explain_serving(plan: ServingPlan, picture: Path | None, as_json: bool) -> None:
    """Print why a model is served so."""
    from ..pages.serving import explained

    if picture:
        from ..pages.serving_picture import draw as draw_front

        draw_front(plan, picture)
    if as_json:
        print_json(plan.model_dump(mode="json"))
        return
    out.print(explained(plan))
    for known in plan.notes:
        note(known)


def explain_cluster(cluster: Cluster, chosen: str | None, picture: Path | None, as_json: bool) -> None:
    """Print what a cluster is and what an equal exchange of a group of its devices waits for."""
    from ...planner.topology import exchange_loads, graph_of
    from ..pages.cluster import cluster_body, cluster_page

    count = len(cluster.devices)
    group = tuple(range(count)) if chosen is None else devices_of(chosen, count)
    graph = graph_of(cluster)
    found = exchange_loads(cluster, graph, group)
    if picture:
        from ..pages.topology_picture import draw_topology

        draw_topology(cluster, graph, found, picture)
    if as_json:
        print_json(cluster_body(cluster, group, found))
    else:
        out.print(cluster_page(cluster, group, found))


def devices_of(text: str, count: int) -> tuple[int, ...]:
    """Devices from a text such as 0-7,12; MoeplanError where it names none, one twice, or one that is not there."""
    wrong = f"--group {text!r}: devices such as 0-7,12 of 0 to {count - 1}, two or more, none twice"
    found = list[int]()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?", part)
        if match is None:
            raise MoeplanError(wrong)
        first = int(match[1])
        found += range(first, 1 + min(int(match[2] or first), count))
    if len(found) < 2 or len(set(found)) != len(found) or max(found) >= count:
        raise MoeplanError(wrong)
    return tuple(found)


def read_placement(path: Path) -> Placement:
    """A placement; a document of another kind is refused with the hint of how to make one."""
    return parse_placement(read_text(path, Placement.hint()), str(path))


def parse_placement(text: str, where: str) -> Placement:
    """The same from its text; ``where`` names it in errors."""
    try:
        return Placement.parse(text, where)
    except DocumentError as error:
        hint = Placement.hint()
        if "kind: expected" not in str(error) or hint in str(error):
            raise
        raise DocumentError(f"{error}{hint}") from None


def trace_of(placement: Placement, where: Path, trace: Path | None) -> Trace:
    """The trace that is given, or else the one that the document names; MoeplanError where there is none."""
    if trace is not None:
        return Trace.read(trace)
    named = placement.trace.path
    if not os.path.exists(named):
        missing = f"its trace {named} is not here" if named else "it names no trace"
        raise MoeplanError(f"{where}: {missing}; pass one with --trace")
    return Trace.read(named)


def body(placement: Placement, explanation: Explanation) -> dict:
    """The document's verdict and scores, and what was found."""
    known = placement.model_dump(
        mode="json", include={"model", "objective", "movement", "balance_cap", "solver", "scores", "moves"}
    )
    return known | {"explanation": explanation.to_dict()}

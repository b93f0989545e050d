"""``moeplan explain``: why a placement is what it is."""

import os
from pathlib import Path
from typing import Annotated

import typer

from ...planner.place.explain import Explanation
from ...planner.place.explain import explain as why
from ...spec.errors import DocumentError, MoeplanError
from ...spec.placement import Placement
from ...spec.trace import Trace
from ..console import note, out, print_json, say
from ..options import MAX_SEED, picture_option
from ..pages.placement_explained import draw, page


def explain(
    placement: Annotated[Path, typer.Argument(help="What `moeplan place` wrote.")],
    trace: Annotated[Path | None, typer.Option(help="Routing (.npz); by default the one that was fitted.")] = None,
    picture: Annotated[Path | None, picture_option("Draw load and crossings")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the placement with one more slot per device.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a page.")] = False,
) -> None:
    """Say why: what limits a placement, its hottest devices, what still crosses, what one more slot would buy.

    Example: `moeplan explain place.json --picture place.png`
    """
    document = read_placement(placement)
    explanation = why(document, trace_of(document, placement, trace), seed=seed)
    if picture:
        draw(document, explanation, picture)
    if as_json:
        print_json(body(document, explanation))
        return
    out.print(page(document, explanation))
    for known in explanation.notes:
        note(known)
    if picture:
        say(f"wrote {picture}")


def read_placement(path: Path) -> Placement:
    """A placement; a document of another kind is refused with the hint of how to make one."""
    try:
        return Placement.read(path)
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

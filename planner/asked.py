"""Which strategies a search looks at, and why not others."""

from ..spec.errors import MissingCurveError, MoeplanError
from ..spec.model import Model
from ..spec.placement import Placement
from ..spec.plan import STRATEGIES, Strategy
from ..spec.routing import Routing
from ..spec.workload import Workload
from .costs import Costs
from .whole import check_measured


def strategies_of(
    asked: str | None, placement: Placement | None, model: Model, workload: Workload
) -> tuple[Strategy, ...]:
    """What is looked at: with a placement, or experts beside the backbone, only ``ep``; for prompts no ``coherent``.

    Raises MoeplanError where that leaves out what was ``asked`` for.
    """
    found = STRATEGIES if asked is None else tuple(known for known in STRATEGIES if known == asked)
    if not found:
        raise MoeplanError(f"strategy {asked!r}: expected one of {', '.join(STRATEGIES)}")
    if any(block.shortcut != "none" for block in model.blocks):
        if "ep" not in found:
            raise MoeplanError(f"strategy {asked}: {model.name} has layers with a shortcut, which run as ep")
        return ("ep",)
    if placement is not None:
        if "ep" not in found:
            raise MoeplanError(f"--placement does not go with --strategy {asked}: only ep keeps experts where it says")
        return ("ep",)
    if workload.phase == "decode":
        return found
    if asked == "coherent":
        raise MoeplanError(
            "--strategy coherent only decodes: a prompt's tokens would lack the keys and values of others that are "
            f"elsewhere; give --workload decode:SEQUENCES[@CONTEXT], or another strategy for {workload}"
        )
    return tuple(known for known in found if known != "coherent")


def without_coherent(costs: Costs, model: Model, routing: Routing, asked: str | None) -> str:
    """Why ``coherent`` is not looked at, as a note; "" if it is. Raises MoeplanError where it was ``asked`` for."""
    try:
        check_measured(costs, model)
    except MissingCurveError:
        if asked is not None:
            raise
        return "not searched, for want of curves: coherent: measure the model again with `moeplan profile`"
    if routing.scale == 1:
        return ""
    why = "coherent steps are followed token by token, and these are too many choices"
    if asked is not None:
        raise MoeplanError(f"--strategy coherent: {why}: give a step of fewer sequences")
    return f"not searched: {why}"

"""Which strategies a search has to choose from, and why one is left out."""

from ..spec.errors import MissingCurveError, MoeplanError
from ..spec.levels import across_groups, inside_groups, two_levels
from ..spec.model import Model
from ..spec.operators import OPERATORS, levels_shape
from ..spec.placement import Placement
from ..spec.plan import STRATEGIES, Strategy
from ..spec.routing import Routing
from .costs import Costs

PLACED: tuple[Strategy, ...] = ("ep", "hierarchical")
"""Strategies whose experts are placed, and under which a degree of devices holds all of them."""
MOST_DEVICES = 256  # of hierarchical, whose rows are counted by pairs of devices


def asked_for(asked: str | None, placement: Placement | None, model: Model) -> tuple[Strategy, ...]:
    """What layers may choose from; a placement leaves only one that keeps experts where it says, by default ``ep``,
    experts beside the backbone only ``ep``."""
    found = STRATEGIES if asked is None else tuple(known for known in STRATEGIES if known == asked)
    if not found:
        raise MoeplanError(f"strategy {asked!r}: expected one of {', '.join(STRATEGIES)}")
    if any(block.shortcut != "none" for block in model.blocks):
        if "ep" not in found:
            raise MoeplanError(f"strategy {asked}: {model.name} has layers with a shortcut, which run as ep")
        return ("ep",)
    if placement is None:
        return found
    if asked is None:
        return ("ep",)
    if asked not in PLACED:
        named = " and ".join(PLACED)
        raise MoeplanError(f"--placement does not go with --strategy {asked}: only {named} keep experts where it says")
    return found


def offered(
    strategies: tuple[Strategy, ...], costs: Costs, model: Model, routing: Routing
) -> tuple[tuple[Strategy, ...], list[str]]:
    """Those of ``strategies`` that can be predicted here and may gain, and what to say of the others.

    Raises MoeplanError where one that was asked for alone cannot.
    """
    if "hierarchical" not in strategies:
        return strategies, []
    alone, why = len(strategies) == 1, _without_levels(costs, routing)
    try:
        if not why:
            _check_curves(costs, model)
            return strategies, []
    except MissingCurveError as error:
        if alone:
            raise
        why = f"for want of curves ({error})"
    if alone:
        raise MoeplanError(f"--strategy hierarchical is not offered {why}")
    kept = tuple(strategy for strategy in strategies if strategy != "hierarchical")
    return kept, [f"not searched: hierarchical, {why}"] if two_levels(costs.hosts) else []


def _without_levels(costs: Costs, routing: Routing) -> str:
    """Why the strategy has no two levels here, or cannot be predicted; empty where it can."""
    if not two_levels(costs.hosts):
        return "without several hosts, one of them with several devices: use ep, which does the same there"
    if costs.devices > MOST_DEVICES:
        return f"for more than {MOST_DEVICES} devices ({costs.devices}), between which its rows are not counted"
    if routing.scale > 1:
        return "for steps of so many tokens, which are not counted one by one: give a step of fewer tokens"
    return ""


def _check_curves(costs: Costs, model: Model) -> None:
    """Raises MissingCurveError for the first curve that the cluster lacks."""
    for groups in (across_groups(costs.hosts), inside_groups(costs.hosts)):
        for group in groups:
            if len(group) > 1:
                costs.cluster.collective("all_to_all", group)
    hosts = len(set(costs.hosts))
    for block in dict.fromkeys(model.layers):
        for operator in OPERATORS if block.moe else ():
            if operator.startswith("hierarchical_"):
                for device in costs.representatives:
                    costs.table(device, operator, levels_shape(block, costs.devices, hosts))

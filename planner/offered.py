"""Which strategies a search has to choose from, and why one is left out."""

from ..spec.cluster import Cluster
from ..spec.errors import MissingCurveError, MoeplanError
from ..spec.levels import across_groups, inside_groups, two_levels
from ..spec.model import Model
from ..spec.operators import OPERATORS, attention_shape, cache_shape, exchange_shape, levels_shape
from ..spec.placement import Placement
from ..spec.plan import BESIDE, IN_MEMORY, STRATEGIES, Strategy
from ..spec.routing import Routing
from ..spec.workload import Workload
from .costs import Costs

PLACED: tuple[Strategy, ...] = ("ep", "hierarchical")
"""Strategies whose experts are placed, and under which a degree of devices holds all of them."""
COHERENT = ("coherent_pack", "coherent_unpack", "coherent_combine", "coherent_home")
MOST_DEVICES = 256  # of hierarchical, whose rows are counted by pairs of devices


def asked_for(asked: str | None, placement: Placement | None, model: Model, workload: Workload) -> tuple[Strategy, ...]:
    """What is looked at: with a placement only one that keeps experts where it says, by default ``ep``; with experts
    beside the backbone only ``ep`` or ``offload``; for prompts no ``coherent``. ``offload`` only where it is asked for:
    what fits into memory is better there.

    Raises MoeplanError where that leaves out what was ``asked`` for.
    """
    found = IN_MEMORY if asked is None else tuple(known for known in STRATEGIES if known == asked)
    if not found:
        raise MoeplanError(f"strategy {asked!r}: expected one of {', '.join(STRATEGIES)}")
    if any(block.shortcut != "none" for block in model.blocks):
        if not set(found).intersection(BESIDE):
            named = " or ".join(BESIDE)
            raise MoeplanError(f"strategy {asked}: {model.name} has layers with a shortcut, which run as {named}")
        found = ("ep",) if asked is None else found
    if model.family_config is not None:
        found = _beside_transformers(found, asked, model)
    if placement is not None:
        if asked is not None and asked not in PLACED:
            named = " and ".join(PLACED)
            raise MoeplanError(
                f"--placement does not go with --strategy {asked}: only {named} keep experts where it says"
            )
        return ("ep",) if asked is None else found
    if workload.phase == "decode":
        return found
    if asked == "coherent":
        raise MoeplanError(
            "--strategy coherent only decodes: a prompt's tokens would lack the keys and values of others that are "
            f"elsewhere; give --workload decode:SEQUENCES[@CONTEXT], or another strategy for {workload}"
        )
    return tuple(known for known in found if known != "coherent")


def _beside_transformers(found: tuple[Strategy, ...], asked: str | None, model: Model) -> tuple[Strategy, ...]:
    """Those that leave all but the experts to Transformers' modules. Raises MoeplanError where none is left."""
    left_out: set[Strategy] = {"coherent", "offload"}
    if any(block.counted and block.counted.whole_outputs for block in model.blocks):
        left_out.add("sharded")
    kept = tuple(known for known in found if known not in left_out)
    if not kept:
        others = " or ".join(known for known in STRATEGIES if known not in left_out)
        raise MoeplanError(
            f"strategy {asked}: the layers of {model.name} are Transformers' own, whose experts run as {others}"
        )
    return kept


def offered(
    strategies: tuple[Strategy, ...], costs: Costs, model: Model, routing: Routing
) -> tuple[tuple[Strategy, ...], list[str]]:
    """Those of ``strategies`` that can be predicted here and may gain, and what to say of the others.

    Raises MoeplanError where one that was asked for alone cannot.
    """
    alone = len(strategies) == 1
    if strategies == ("offload",) and (why := without_tier(costs.cluster, routing)):
        raise MoeplanError(f"--strategy offload: {why}")
    said = {
        "hierarchical": _without_hierarchical(costs, model, routing, alone) if "hierarchical" in strategies else "",
        "coherent": _without_coherent(costs, model, routing, alone) if "coherent" in strategies else "",
    }
    expected = {"coherent"} | ({"hierarchical"} if two_levels(costs.hosts) else set())
    notes = [why for strategy, why in said.items() if why and strategy in expected]
    return tuple(strategy for strategy in strategies if not said.get(strategy)), notes


def without_tier(cluster: Cluster, routing: Routing) -> str:
    """Why experts cannot be planned to rest outside memory; "" if they can."""
    for kind in cluster.kinds:
        if kind.slow_tier is None:
            return (
                f"no disk was measured for devices of kind {kind.name}: profile with --offload FOLDER, on a disk of "
                "every host"
            )
    if len({kind.disk.folder for kind in cluster.kinds if kind.disk}) > 1:
        return "the cluster's kinds of devices have disks in different folders: profile them with one --offload FOLDER"
    return "" if routing.scale == 1 else "steps of so many tokens are not counted one by one: give one of fewer tokens"


def folder_of(cluster: Cluster) -> str:
    """Where experts rest; empty for the memory of GPUs' hosts."""
    return next((kind.disk.folder for kind in cluster.kinds if kind.disk and kind.type == "cpu"), "")


def _without_hierarchical(costs: Costs, model: Model, routing: Routing, alone: bool) -> str:
    """Why it is not searched, as a note; "" if it is. Raises where it was asked for ``alone``."""
    why = _without_levels(costs, routing)
    try:
        if not why:
            _check_curves(costs, model)
            return ""
    except MissingCurveError as error:
        if alone:
            raise
        why = f"for want of curves ({error})"
    if alone:
        raise MoeplanError(f"--strategy hierarchical is not offered {why}")
    return f"not searched: hierarchical, {why}"


def _without_coherent(costs: Costs, model: Model, routing: Routing, alone: bool) -> str:
    """The same of ``coherent``."""
    try:
        _check_coherent(costs, model)
    except MissingCurveError:
        if alone:
            raise
        return "not searched, for want of curves: coherent: measure the model again with `moeplan profile`"
    if routing.scale == 1:
        return ""
    why = "coherent steps are followed token by token, and these are too many choices"
    if alone:
        raise MoeplanError(f"--strategy coherent: {why}: give a step of fewer sequences")
    return f"not searched: {why}"


def _check_coherent(costs: Costs, model: Model) -> None:
    """Raise MissingCurveError for the first curve of ``coherent`` steps that the cluster lacks."""
    for block in dict.fromkeys(model.layers):
        for device in costs.representatives:
            if block.attention is not None:
                costs.table(device, "attention_scattered", attention_shape(block))
                costs.table(device, "coherent_cache", cache_shape(block, costs.devices))
            for operator in COHERENT if block.moe is not None else ():
                costs.table(device, operator, exchange_shape(block, costs.devices))


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

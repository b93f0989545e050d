"""How tokens travel under ``ep``, ``hierarchical`` and ``sharded``: in how many chunks, and, where the backbone runs
beside them (a shortcut), how early the experts are computed.

A chunk costs messages and calls more for every device, and hides at most what is shorter of what runs at the same time:
travelling, in two levels each by itself, and computing. On one network all are dispatched, and each travels back when
it is computed, than which no order of equal chunks on a network and a processor is faster (CP-SAT in
tests/test_chunk_order.py); in two levels every layer has the order that is fastest for it (``ordering``). An expert's
slot divides the backbone between the way there and the way back. Which of all these is fastest is read from the
measured curves (``strategies``), in a few layers first.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np

from ..spec.model import Block
from ..spec.plan import CHUNKED, LayerPlan
from ..spec.shortcut import slots
from .alternatives import Choice
from .budget import Budget
from .clock import longest_chains
from .layout import Layout
from .options import Classes
from .ordering import fastest_orders, has_orders, in_order
from .step import Step, build
from .strategies import Layer

COUNTS = (1, 2, 4, 8)
MOVING = ("dispatch", "combine")  # parts whose exchanges chunks may hide
KEPT = 2  # ways that are predicted in all layers, of the fastest in a few
NEAR = 2.0  # times the fastest of all that a plan may take to be looked at in chunks
GAIN = 0.02  # of these layers' time that a way must be able to save before it is looked at closely


def ways(plans: Sequence[LayerPlan], blocks: Sequence[Block], tokens: int) -> list[tuple[LayerPlan, ...]]:
    """The same plans (one per class of layers, with its block) in every number of chunks and every slot, but for what
    they are; nothing where none of them travels.

    tokens: of the device that has the most: no more chunks than it could fill.
    """
    if not any(plan.strategy in CHUNKED for plan in plans):
        return []
    found = []
    for count, slot in product([n for n in COUNTS if n <= max(tokens, 1)], range(max(map(slots, blocks)))):
        known: dict[tuple[LayerPlan, int], LayerPlan] = {}  # equal plans stay one object
        way = []
        for plan, block in zip(plans, blocks, strict=True):
            at = min(slot, slots(block) - 1)
            changes = {"chunks": count if plan.strategy in CHUNKED else 1, "slot": at}
            way.append(known.setdefault((plan, at), plan.model_copy(update=changes)))
        if way != list(plans):
            found.append(tuple(way))
    return found


def fastest_alone(
    choices: Sequence[Choice], classes: Classes, most: int
) -> dict[tuple[Layout, int], dict[tuple[LayerPlan, ...], None]]:
    """Plans (one per class) of the fastest choices that are one of ``CHUNKED`` throughout, by layout and expert degree;
    of each strategy, those of ``most`` layouts and degrees, and none that is not ``NEAR`` the fastest of all."""
    found: dict[tuple[Layout, int], dict[tuple[LayerPlan, ...], None]] = {}
    known: dict[str, set[tuple[Layout, int]]] = {strategy: set() for strategy in CHUNKED}
    fitting = [choice for choice in choices if choice.plans and not choice.candidate.reason]
    fastest = min((choice.seconds for choice in fitting), default=0.0)
    for choice in sorted(fitting, key=lambda choice: choice.seconds):
        used = {plan.strategy for plan in choice.plans}
        space = choice.step.layout, choice.candidate.degrees.expert
        if len(used) > 1 or not used <= set(CHUNKED) or choice.seconds > NEAR * fastest:
            continue
        spaces = known[used.pop()]
        if space in spaces or len(spaces) < most:
            spaces.add(space)
            plans = tuple(choice.plans[members[0]] for members in classes.members)
            found.setdefault(space, {}).setdefault(plans)
    return found


def promising(
    step: Step, classes: Classes, plans: Sequence[LayerPlan], budget: Budget
) -> list[tuple[LayerPlan, ...]] | None:
    """The ways of ``plans`` that are faster than these in a few layers, the fastest ``KEPT``; None where there is none
    to try. Of what travels in two levels also with each class's own order of the chunks.

    In all layers every way would cost as much to predict as the search so far.
    """
    blocks = [step.model.moe_block(members[0]) for members in classes.members]
    found = ways(plans, blocks, max(step.layout.tokens))
    if not found:
        return None
    members = [classes.members[c][0] for c in sorted({0, len(classes.members) // 2, len(classes.members) - 1})]
    layers = [(step.layer([step.model.moe_layers[j]]), int(classes.of_ordinal[j])) for j in members]
    nothing = np.zeros((1, step.layout.devices))

    def least(way: Sequence[LayerPlan]) -> float:
        """Of the longest chains, which nothing slows."""
        chains = (longest_chains(build(layer, [way[c]]), 1, step.layout.devices) for layer, c in layers)
        return sum(float(chain.ends(nothing).max()) for chain in chains)

    def seconds(way: Sequence[LayerPlan]) -> float:
        if has_orders(way):
            some = [way[c] for _, c in layers]
            return float(fastest_orders(step, some, [[j] for j in members], budget).seconds.sum())
        return sum(float(step.cost(layer, [way[c]]).seconds[0]) for layer, c in layers)

    def travel(layer: Layer, plan: LayerPlan) -> float:
        """What chunks could hide at most: all that moves tokens."""
        moving = (stage for stage in build(layer, [plan]) if stage.kind == "exchange" and stage.part in MOVING)
        return sum(float((stage.seconds if stage.level is None else stage.level).max()) for stage in moving)

    now = seconds(plans)
    at_once = all(block.shortcut == "none" for block in blocks) and all(plan.chunks == 1 for plan in plans)
    if at_once and sum(travel(layer, plans[c]) for layer, c in layers) < GAIN * now:
        return []
    open_ways = [(i, way) for i, way in enumerate(found) if has_orders(way) or least(way) < (1 - GAIN) * now]
    ranked = sorted(((seconds(way), i) for i, way in open_ways), key=lambda pair: pair[0])
    kept = [found[i] for taken, i in ranked[:KEPT] if taken < now]
    own = [in_order(step, classes, way, budget) for way in kept]
    return kept + [way for way in own if way not in kept]

"""How the tokens of ``ep`` travel: in how many chunks, and, where the backbone runs beside them (a shortcut), how early
the experts are computed.

A chunk costs a message and a call more for every device, and hides at most the shorter of what travels and what is
computed; an expert's slot divides the backbone between the way there and the way back. Which of all these is fastest is
read from the measured curves (``strategies.ep``).
"""

from collections.abc import Sequence
from itertools import product

from ..spec.model import Block
from ..spec.plan import CHUNKED, LayerPlan
from ..spec.shortcut import slots

COUNTS = (1, 2, 4, 8)


def ways(plans: Sequence[LayerPlan], blocks: Sequence[Block], tokens: int) -> list[tuple[LayerPlan, ...]]:
    """The same plans (one per class of layers, with its block) in every number of chunks and every slot, but for what
    they are; nothing where none of them travels.

    tokens: of the device that has the most: no more chunks than it could fill.
    """
    if not any(plan.strategy in CHUNKED for plan in plans):
        return []
    found = []
    for count, slot in product([n for n in COUNTS if n <= max(tokens, 1)], range(max(map(slots, blocks)))):
        known: dict[tuple[LayerPlan, int], LayerPlan] = {}
        for plan, block in zip(plans, blocks, strict=True):
            at = min(slot, slots(block) - 1)
            if (plan, at) not in known:
                chunks = count if plan.strategy in CHUNKED else 1
                known[plan, at] = plan.model_copy(update={"chunks": chunks, "slot": at})
        way = [known[plan, min(slot, slots(block) - 1)] for plan, block in zip(plans, blocks, strict=True)]
        if any(new != plan for new, plan in zip(way, plans, strict=True)):
            found.append(tuple(way))
    return found

"""In how many chunks the tokens of the fastest plans should travel, so that one travels while another is computed.

A chunk costs a message and a call more for every device, and hides at most the shorter of what travels and what is
computed; which of the two counts more is read from the measured curves (``strategies.ep``).
"""

from collections.abc import Sequence

from ..spec.plan import CHUNKED, LayerPlan

COUNTS = (2, 4, 8)


def in_chunks(plans: Sequence[LayerPlan], tokens: int) -> list[tuple[LayerPlan, ...]]:
    """The same plans (one per class of layers) in more and more chunks; nothing where none of them can be cut.

    tokens: of the device that has the most: no more chunks than it could fill.
    """
    if not any(plan.strategy in CHUNKED for plan in plans):
        return []
    found = []
    for count in COUNTS:
        if count <= tokens:
            cut: dict[LayerPlan, LayerPlan] = {}
            for plan in plans:
                if plan not in cut:
                    chunks = count if plan.strategy in CHUNKED else 1
                    cut[plan] = plan.model_copy(update={"chunks": chunks})
            found.append(tuple(cut[plan] for plan in plans))
    return found

"""A choice whose replicas are predicted request by request, before it is believed.

Formulas are quick and see every offer; a prediction of every request sees the chosen ones. Where it differs, the
offer's times are replaced and the numbers of replicas chosen again, until all that is chosen is predicted so.
"""

from collections.abc import Callable, Sequence

from ...spec.errors import InfeasibleError, MoeplanError
from ...spec.serving_load import ServingLoad
from .classes import DeviceClass
from .offers import Offer
from .search import Choice, Limits, choose

MOST_ROUNDS = 12
MOST_EXACT = 512  # requests in flight: a load of more takes seconds to go through, and is closer to a steady one
Exact = Callable[[str, Offer, Sequence[DeviceClass]], tuple[float, float]]
"""(engine, offer, classes) -> TTFT and TPOT in seconds. MoeplanError where it cannot say."""


def refined(
    choice: Choice,
    offers: Sequence[Offer],
    classes: Sequence[DeviceClass],
    load: ServingLoad,
    limits: Limits,
    exact: Exact,
) -> Choice | None:
    """The choice, all of it predicted so; None where nothing is left.

    Pipelines of several stages, and replicas with more than ``MOST_EXACT`` requests in flight, keep what the formulas
    say.
    """
    table = list(offers)
    for _ in range(MOST_ROUNDS):
        open_ = [offer for offer, _ in choice.picks if _unseen(offer)]
        if not open_:
            return choice
        for offer in open_:
            try:
                better = predicted(choice.engine, offer, classes, load, exact)
            except MoeplanError:
                table.remove(offer)
                continue
            table[table.index(offer)] = better
        try:
            choice = choose(choice.engine, table, classes, load, limits)
        except InfeasibleError:
            return None
    seen = [offer for offer in table if not _unseen(offer)]
    try:
        return choose(choice.engine, seen, classes, load, limits)
    except InfeasibleError:
        return None


def predicted(engine: str, offer: Offer, classes: Sequence[DeviceClass], load: ServingLoad, exact: Exact) -> Offer:
    """The offer with times request by request, where they can be told. Raises MoeplanError as ``exact``."""
    return offer.predicted(*exact(engine, offer, classes), load.osl) if _unseen(offer) else offer


def _unseen(offer: Offer) -> bool:
    told = offer.form.shape.pp == 1 and offer.role == "both" and offer.in_flight <= MOST_EXACT
    return told and not offer.exact

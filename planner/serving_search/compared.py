"""What a choice is compared with, and the front of what one replica can do."""

from collections.abc import Sequence

import numpy as np

from ...spec.errors import InfeasibleError
from ...spec.serving_load import ServingLoad
from .classes import DeviceClass
from .forms import Form
from .offers import Offer, Offering, counts_of
from .search import Choice, Limits, choose

Picks = tuple[tuple[Offer, int], ...]
"""Offers with how many of each."""


def only(
    engine: str,
    number: int,
    offers: Sequence[Offer],
    classes: Sequence[DeviceClass],
    load: ServingLoad,
    limits: Limits,
    whole: bool = True,
) -> Choice | None:
    """The best choice with one class of devices alone; None where there is none. whole: as of ``search.choose``."""
    mine = [offer for offer in offers if set(offer.form.on) == {number}]
    try:
        return choose(engine, mine, classes, load, limits, whole)
    except InfeasibleError:
        return None


def equal(
    offering: Offering, candidates: Sequence[Form], offers: Sequence[Offer], load: ServingLoad, limits: Limits
) -> Picks | None:
    """The best choice that treats all devices alike: the same degrees, layers divided evenly, equally many requests in
    flight on every replica. None where there is none.

    Either replicas on every class of its own, or replicas whose stages lie on several, as many as there are GPUs for.
    """
    classes = offering.classes
    counts = counts_of(load, sum(c.gpus for c in classes))
    found = list[Picks]()
    alike: dict[tuple[object, int], dict[int, Offer]] = {}
    for offer in offers:
        if not offer.form.mixed:
            alike.setdefault((offer.form.shape, offer.in_flight), {})[offer.form.on[0]] = offer
    for mine in alike.values():
        if len(mine) == len(classes):
            found += _alike(list(mine.values()), [classes[c].gpus // mine[c].form.gpus for c in mine], load, limits)
    for form in candidates:
        if form.mixed:
            need = form.need(len(classes))
            most = min(c.gpus // n for c, n in zip(classes, need, strict=True) if n)
            for offer in offering.offers(form, counts, even=True):
                found += _alike([offer], [most], load, limits)
    return max(found, key=lambda picks: sum(offer.tokens * n for offer, n in picks), default=None)


def _alike(offers: Sequence[Offer], replicas: Sequence[int], load: ServingLoad, limits: Limits) -> list[Picks]:
    """Equally loaded replicas, if they meet the limits and take all requests."""
    if not all(map(limits.allow, offers)):
        return []
    if load.concurrency is not None and abs(offers[0].in_flight * sum(replicas) - load.concurrency) > sum(replicas):
        return []
    return [tuple(zip(offers, replicas, strict=True))]


def front(offers: Sequence[Offer], limits: Limits) -> list[Offer]:
    """Offers that no other beats in TPOT and in tokens per second and GPU, by rising TPOT."""
    allowed = sorted((o for o in offers if limits.allow(o)), key=lambda o: (o.tpot, -o.per_gpu))
    best = np.maximum.accumulate([0.0, *(o.per_gpu for o in allowed)])
    return [offer for offer, before in zip(allowed, best, strict=False) if offer.per_gpu > before]

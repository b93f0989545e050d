"""Prefill and decode apart: workers that compute prompts and hand their cache to workers that decode.

A prefill worker at utilisation rho answers rho / p prompts per second; a prompt takes its time through all stages, the
wait rho / (2 (1 - rho)) * p (Pollaczek-Khinchine, service of one length), and the cache's way over the network, every
GPU sending its part. A decode worker with c requests makes c tokens in a step that no prompt interrupts. How many of
which: the integer program of ``search``, with a row that has what decodes prefilled.
"""

import math
from collections.abc import Sequence

from .forms import Form
from .offers import Known, Offer, Offering

UTILISATIONS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


def apart_offers(offering: Offering, form: Form, counts: Sequence[int]) -> list[Offer]:
    """Of one form on devices of one class, as a prefill worker at every utilisation and as a decode worker."""
    if form.mixed or form.shape.pp > 1:
        return []
    known = offering.known(offering.classes[form.on[0]].system, form.shape.division, counts[-1])
    if isinstance(known, str):
        return []
    return [*_prefill(offering, form, known), *_decode(offering, form, known, counts)]


def _prefill(offering: Offering, form: Form, known: Known) -> list[Offer]:
    division, one = form.shape.division, offering.classes[form.on[0]]
    layers = offering.fit(form, division.dp)
    if layers is None:
        return []
    cache = float(offering.sizes.layer_cache(division, offering.load.isl).sum())
    found = []
    for rho in UTILISATIONS:
        ttft = known.prompt + rho / (2 * (1 - rho)) * known.each + cache / one.outside
        rate = rho / known.each
        in_flight = max(1, math.ceil(rate * ttft))
        found.append(Offer(form, in_flight, layers, ttft, 0.0, 0.0, rate, role="prefill"))
    return found


def _decode(offering: Offering, form: Form, known: Known, counts: Sequence[int]) -> list[Offer]:
    found = []
    for count in (c for c in counts if c >= form.shape.division.dp):
        layers = offering.fit(form, count)
        if layers is None:
            break
        tpot = known.step(count)
        tokens = count / tpot
        requests = tokens / max(offering.load.osl - 1, 1)  # the first token comes from the prefill worker
        found.append(Offer(form, count, layers, 0.0, tpot, requests * offering.load.osl, requests, role="decode"))
    return found

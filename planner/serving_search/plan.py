"""The plan document: from a model, a cluster, a load and times to replicas with what they hold and do."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...spec.cluster import Cluster
from ...spec.errors import InfeasibleError, MoeplanError
from ...spec.model import Model
from ...spec.serving import (
    Baseline,
    FrontPoint,
    Replicas,
    Served,
    ServingDegrees,
    ServingPlan,
    ServingSolver,
    ServingStage,
    StageMemory,
)
from ...spec.serving_load import ServingLoad
from .apart import apart_offers
from .classes import DeviceClass, classes_of
from .compared import equal, front, only
from .engines import FACTS, MEMORY_FRACTION
from .footprint import GIB
from .forms import Form, forms
from .offers import Offer, Times, counts_of
from .precision import Precision, in_precision, precision_of
from .refine import Exact, predicted, refined
from .search import NO_LIMITS, Choice, Found, Limits, Progress, choose, search, why


@dataclass(frozen=True)
class Predictor:
    """times: of single steps; exact: request by request, where that is known; source: which tables."""

    times: Times
    exact: Exact | None
    source: str


def plan_serving(
    model: Model,
    cluster: Cluster,
    load: ServingLoad,
    predictor: Predictor,
    *,
    asked: str = "",
    engine: str | None = None,
    precision: Precision | None = None,
    limits: Limits = NO_LIMITS,
    apart: bool | None = None,
    progress: Progress | None = None,
) -> ServingPlan:
    """engine, precision: None for any, and for the model's own. apart: prefill and decode on workers of their own
    (True), never (False), or whichever does better (None).

    Raises InfeasibleError, one line with what is missing, and MoeplanError where tables or rules say no.
    """
    if engine is not None and engine not in FACTS:
        raise MoeplanError(f"engine {engine!r}: expected one of {', '.join(FACTS)}")
    if not model.causal:
        raise MoeplanError(f"model {model.name!r}: engines serve decoder-only language models, which this is not")
    served = in_precision(model, precision)
    classes, notes = classes_of(cluster)
    engines = [engine] if engine else list(FACTS)
    found = search(served, classes, load, predictor.times, engines, limits, progress)
    kept = list[tuple[Choice, list[Offer]]]()
    for name in engines:
        if not apart and name in found.choices:
            choice = _refined(found, name, classes, load, limits, predictor.exact)
            kept += [(choice, found.offers[name])] if choice else []
        if apart is not False:
            workers = _workers(found, name, served, classes, load)
            kept += [(choice, workers)] if (choice := _apart(name, workers, classes, load, limits)) else []
    if not kept:
        raise InfeasibleError(why(served, classes, found))
    best, offers = min(kept, key=lambda pair: pair[0].rank)
    baselines = _baselines(found, best, offers, served, classes, load, limits, predictor.exact)
    return _document(
        served, cluster, classes, load, found, best, limits, baselines, asked, precision, predictor.source, notes
    )


def _refined(
    found: Found, engine: str, classes: Sequence[DeviceClass], load: ServingLoad, limits: Limits, exact: Exact | None
) -> Choice | None:
    if exact is None:
        return found.choices[engine]
    return refined(found.choices[engine], found.offers[engine], classes, load, limits, exact)


def _workers(found: Found, engine: str, model: Model, classes: Sequence[DeviceClass], load: ServingLoad) -> list[Offer]:
    offering, counts = found.offering[engine], counts_of(load, sum(c.gpus for c in classes))
    return [o for form in forms(engine, model, classes)[0] for o in apart_offers(offering, form, counts)]


def _apart(
    engine: str, workers: Sequence[Offer], classes: Sequence[DeviceClass], load: ServingLoad, limits: Limits
) -> Choice | None:
    try:
        return choose(engine, workers, classes, load, limits, whole=False)
    except InfeasibleError:
        return None


def _document(
    model: Model,
    cluster: Cluster,
    classes: Sequence[DeviceClass],
    load: ServingLoad,
    found: Found,
    best: Choice,
    limits: Limits,
    baselines: tuple[Baseline, ...],
    asked: str,
    precision: Precision | None,
    source: str,
    notes: Sequence[str],
) -> ServingPlan:
    requests = sum(o.requests * n for o, n in best.picks if o.role != "prefill")
    ttft, tpot = max(o.ttft for o, _ in best.picks), max(o.tpot for o, _ in best.picks)
    tokens, gpus = best.tokens, best.gpus
    picks = sorted(best.picks, key=lambda pick: (-pick[0].tokens * pick[1], pick[0].form.on, pick[0].in_flight))
    offers = found.offers[best.engine]
    everything = [(e, offer) for e, mine in found.offers.items() for offer in front(mine, limits)]
    return ServingPlan(
        model=model.name,
        asked=asked,
        engine=best.engine,
        precision=precision or precision_of(model),
        load=load,
        ttft_limit_s=limits.ttft,
        tpot_limit_s=limits.tpot,
        tables=source,
        replicas=tuple(_replicas(o, n, classes, found, best.engine, requests) for o, n in picks),
        predicted=Served(ttft_s=ttft, tpot_s=tpot, tokens_per_s=tokens, tokens_per_s_per_gpu=tokens / gpus),
        requests_per_s=requests,
        gpus=gpus,
        gpus_there=len(cluster.devices),
        front=tuple(_point(e, o, classes) for e, o in _best_of_all(everything)),
        baselines=baselines,
        solver=ServingSolver(
            status=best.solution.status,
            objective=abs(best.solution.objective),
            bound=abs(best.solution.bound),
            forms=found.looked_at[best.engine],
            offers=len(offers),
            refused=dict(found.refused[best.engine].most_common()),
        ),
        notes=(*notes, *_notes(load, best)),
        digests={"model": model.digest(), "cluster": cluster.digest()},
    )


def _notes(load: ServingLoad, best: Choice) -> list[str]:
    found = []
    if load.longest is not None:
        found.append(
            f"{load.requests:,} requests of the log are planned as {load.isl} + {load.osl} tokens each, their means; "
            f"memory is kept for the longest, {load.longest:,} tokens"
        )
    if any(not offer.exact for offer, _ in best.picks):
        found.append("times of these replicas come from single steps and queueing formulas, not request by request")
    if load.concurrency is not None and best.in_flight < load.concurrency:
        left = load.concurrency - best.in_flight
        found.append(f"{left:,} of {load.concurrency:,} requests in flight wait, as shares are whole requests")
    return found


def _replicas(
    offer: Offer, count: int, classes: Sequence[DeviceClass], found: Found, engine: str, requests: float
) -> Replicas:
    offering, shape = found.offering[engine], offer.form.shape
    tokens = offering.load.isl if offer.role == "prefill" else offering.load.most_tokens
    in_flight = shape.division.dp if offer.role == "prefill" else offer.in_flight
    held = offering.sizes.footprints(shape.division, offer.layers, in_flight, tokens, offering.step(offer.in_flight))
    stages = []
    for number, layers, memory in zip(offer.form.on, offer.layers, held, strict=True):
        one = classes[number]
        limit = int(MEMORY_FRACTION * one.memory)
        if memory.total > limit:
            raise AssertionError(f"{one.kind}: {memory.total / GIB:.2f} GiB do not fit into {limit / GIB:.2f}")
        parts = StageMemory(**memory.parts(), limit=limit)
        gpus = shape.division.gpus
        stages.append(ServingStage(kind=one.kind, per_host=one.per_host, gpus=gpus, layers=layers, memory=parts))
    return Replicas(
        role=offer.role,
        count=count,
        degrees=_degrees(offer.form),
        stages=tuple(stages),
        concurrency=offer.in_flight,
        share=min(1.0, offer.requests * count / requests),
        each=_served(offer),
    )


def _served(offer: Offer) -> Served:
    return Served(ttft_s=offer.ttft, tpot_s=offer.tpot, tokens_per_s=offer.tokens, tokens_per_s_per_gpu=offer.per_gpu)


def _degrees(form: Form) -> ServingDegrees:
    d = form.shape.division
    return ServingDegrees(tp=d.tp, dp=d.dp, moe_tp=d.moe_tp, moe_ep=d.moe_ep, pp=form.shape.pp)


def _point(engine: str, offer: Offer, classes: Sequence[DeviceClass]) -> FrontPoint:
    kinds = tuple(classes[c].kind for c in offer.form.on)
    return FrontPoint(
        degrees=_degrees(offer.form), kinds=kinds, engine=engine, concurrency=offer.in_flight, each=_served(offer)
    )


def _best_of_all(points: Sequence[tuple[str, Offer]]) -> list[tuple[str, Offer]]:
    """Of the fronts of all engines, those that none beats."""
    kept, best = list[tuple[str, Offer]](), 0.0
    for engine, offer in sorted(points, key=lambda p: (p[1].tpot, -p[1].per_gpu)):
        if offer.per_gpu > best:
            kept.append((engine, offer))
            best = offer.per_gpu
    return kept


def _baselines(
    found: Found,
    best: Choice,
    offers: Sequence[Offer],
    model: Model,
    classes: Sequence[DeviceClass],
    load: ServingLoad,
    limits: Limits,
    exact: Exact | None,
) -> tuple[Baseline, ...]:
    """Only where there are several classes: each alone, and all treated alike; predicted as the best was. offers: among
    which that was."""
    if len(classes) < 2:
        return ()
    engine, whole, kept = best.engine, best.picks[0][0].role == "both", list[Baseline]()
    for number, one in enumerate(classes):
        alone = only(engine, number, offers, classes, load, limits, whole)
        if alone is not None and exact is not None and whole:
            mine = [offer for offer in offers if set(offer.form.on) == {number}]
            alone = refined(alone, mine, classes, load, limits, exact)
        if alone is not None:
            kept.append(Baseline(name=f"only {one.name}", tokens_per_s=alone.tokens, gpus=alone.gpus))
    together = found.offers[engine]
    alike = equal(found.offering[engine], forms(engine, model, classes)[0], together, load, limits)
    if alike is not None:
        told = alike
        if exact is not None:
            told = tuple((predicted(engine, offer, classes, load, exact), n) for offer, n in alike)
        tokens, gpus = sum(o.tokens * n for o, n in told), sum(o.form.gpus * n for o, n in told)
        kept.append(Baseline(name="all devices treated alike", tokens_per_s=tokens, gpus=gpus))
    return tuple(kept)

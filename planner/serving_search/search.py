"""The search: which forms, how many replicas of each, with how many requests in flight.

For every engine all forms are offered (``offers``), those beyond the limits on TTFT and TPOT left out, and the numbers
of replicas chosen by an integer program (``solvers.replicas``): most tokens per second on the devices there are, or
fewest GPUs for a rate of requests. The engine whose choice does best is planned for.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...solvers.replicas import Problem, choose_replicas
from ...solvers.result import Infeasible, NotFound, Solution
from ...spec.errors import InfeasibleError, MoeplanError
from ...spec.model import Model
from ...spec.serving_load import ServingLoad
from .classes import DeviceClass, class_names
from .engines import FACTS
from .footprint import GIB, Sizes
from .forms import Form, forms
from .offers import Offer, Offering, Times, counts_of

MOST_FORMS = 4  # of replicas in one plan, each with its number of requests in flight: more are work to run
SEARCH_SECONDS = 20.0  # ceiling of one integer program
SLACK = 0.02  # of more than 64 requests in flight: how many may be left over by shares of whole requests
Progress = Callable[[dict[str, object]], None]


@dataclass(frozen=True)
class Limits:
    """Seconds; None: no limit. fewest: least GPUs that meet them instead of most tokens."""

    ttft: float | None = None
    tpot: float | None = None
    fewest: bool = False

    def allow(self, offer: Offer) -> bool:
        return (self.ttft is None or offer.ttft <= self.ttft) and (self.tpot is None or offer.tpot <= self.tpot)


NO_LIMITS = Limits()


@dataclass(frozen=True)
class Choice:
    """Offers with how many of each; ``value``: tokens per second, or GPUs where fewest were asked for."""

    engine: str
    picks: tuple[tuple[Offer, int], ...]
    solution: Solution[np.ndarray]
    fewest: bool

    @property
    def tokens(self) -> float:
        return sum(offer.tokens * count for offer, count in self.picks)

    @property
    def gpus(self) -> int:
        return sum(offer.form.gpus * count for offer, count in self.picks)

    @property
    def in_flight(self) -> int:
        return sum(offer.in_flight * count for offer, count in self.picks)

    @property
    def rank(self) -> tuple[float, float]:
        """Less is better."""
        return (self.gpus, -self.tokens) if self.fewest else (-self.tokens, self.gpus)


@dataclass
class Found:
    """choices: of every engine that has one; offers: of every engine; offering: what was refused, and why."""

    choices: dict[str, Choice] = field(default_factory=dict)
    offers: dict[str, list[Offer]] = field(default_factory=dict)
    offering: dict[str, Offering] = field(default_factory=dict)
    refused: dict[str, Counter[str]] = field(default_factory=dict)
    looked_at: dict[str, int] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def search(
    model: Model,
    classes: Sequence[DeviceClass],
    load: ServingLoad,
    times: Times,
    engines: Sequence[str],
    limits: Limits = NO_LIMITS,
    progress: Progress | None = None,
) -> Found:
    """The best choice of every engine that has one; ``why`` says what keeps the others from it."""
    found, sizes = Found(), Sizes(model)
    for engine in engines:
        offering = Offering(engine, sizes, classes, load, times)
        candidates, refused = forms(engine, model, classes)
        counts = counts_of(load, sum(c.gpus for c in classes))
        offers = list[Offer]()
        for i, form in enumerate(candidates):
            if progress is not None:
                progress({"done": i, "of": len(candidates), "what": f"{FACTS[engine].title}: forms of a replica"})
            offers += offering.offers(form, counts)
        found.offers[engine], found.offering[engine] = offers, offering
        found.refused[engine] = refused + offering.refused
        found.looked_at[engine] = len(candidates)
        try:
            found.choices[engine] = choose(engine, offers, classes, load, limits)
        except InfeasibleError as error:
            found.problems[engine] = str(error)
    return found


def choose(
    engine: str,
    offers: Sequence[Offer],
    classes: Sequence[DeviceClass],
    load: ServingLoad,
    limits: Limits,
    whole: bool = True,
) -> Choice:
    """Numbers of replicas of these offers; whole: they take all requests in flight, but for ``SLACK``.

    Raises InfeasibleError.
    """
    allowed = [offer for offer in offers if limits.allow(offer)]
    if offers and not allowed:
        raise InfeasibleError(_beyond(offers, limits))
    fewest = limits.fewest or load.rate is not None
    need, stock = _rows(allowed, classes, load, whole)
    cost = np.array([offer.form.gpus if fewest else -offer.tokens for offer in allowed], float)
    if not allowed:
        raise InfeasibleError("no form of a replica fits")
    try:
        solution = choose_replicas(Problem(cost, need, stock), MOST_FORMS, time_limit=SEARCH_SECONDS)
    except Infeasible:
        raise InfeasibleError(_too_much(allowed, classes, load)) from None
    except NotFound as error:
        raise MoeplanError(str(error)) from None
    picks = tuple((offer, int(n)) for offer, n in zip(allowed, solution.assignment, strict=True) if n)
    if not picks:
        raise InfeasibleError("the devices do not suffice for one replica")
    return Choice(engine, picks, solution, fewest)


def _rows(
    offers: Sequence[Offer], classes: Sequence[DeviceClass], load: ServingLoad, whole: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Needs [J, R] and stock [R]: GPUs of every class, then requests in flight and demand."""
    columns = [np.array([offer.form.need(len(classes)) for offer in offers], float).reshape(-1, len(classes))]
    stock = [float(one.gpus) for one in classes]
    if load.concurrency is not None:
        in_flight = np.array([[offer.in_flight] for offer in offers], float).reshape(-1, 1)
        least = load.concurrency * (1 - SLACK) if load.concurrency > 64 else load.concurrency
        columns += [in_flight, -in_flight] if whole else [in_flight]
        stock += [float(load.concurrency), -float(np.ceil(least))] if whole else [float(load.concurrency)]
    if load.rate is not None:
        columns.append(np.array([[-o.requests * (o.role != "prefill")] for o in offers], float).reshape(-1, 1))
        stock.append(-load.rate)
    if any(offer.role != "both" for offer in offers):  # what decodes must have been prefilled
        sign = {"both": 0.0, "prefill": -1.0, "decode": 1.0}
        columns.append(np.array([[sign[o.role] * o.requests] for o in offers], float).reshape(-1, 1))
        stock.append(0.0)
    return np.concatenate(columns, axis=1), np.array(stock)


def _beyond(offers: Sequence[Offer], limits: Limits) -> str:
    ttft, tpot = min(o.ttft for o in offers), min(o.tpot for o in offers)
    asked = [f"TTFT {limits.ttft * 1e3:g} ms"] if limits.ttft else []
    asked += [f"TPOT {limits.tpot * 1e3:g} ms"] if limits.tpot else []
    return (
        f"no form of a replica meets {' and '.join(asked)}: the least TTFT of any is {ttft * 1e3:.1f} ms, "
        f"the least TPOT {tpot * 1e3:.2f} ms; raise a limit, or use faster devices"
    )


def _too_much(offers: Sequence[Offer], classes: Sequence[DeviceClass], load: ServingLoad) -> str:
    """What the devices can take at most, where they cannot take the load."""
    bare = load.model_copy(update={"concurrency": None, "rate": None})
    need, stock = _rows(offers, classes, bare)
    if load.rate is not None:
        able = np.array([offer.requests * (offer.role != "prefill") for offer in offers])
        most = -choose_replicas(Problem(-able, need, stock)).objective
        return f"{load.rate:g} requests/s are asked for, all devices answer {most:.4g} within the limits: add devices"
    able = np.array([offer.in_flight for offer in offers], float)
    most = -choose_replicas(Problem(-able, need, stock)).objective
    if load.concurrency is not None and most >= load.concurrency:
        return (
            f"{load.concurrency:,} requests in flight cannot be divided over replicas of these forms: every group and "
            "stage needs one; ask for more of them, or leave concurrency out"
        )
    return (
        f"{load.concurrency:,} requests in flight are asked for, all devices hold {most:,.0f} within the limits: "
        "add devices, or ask for fewer"
    )


def why(model: Model, classes: Sequence[DeviceClass], found: Found) -> str:
    """One line: what kept every engine from a choice."""
    problems = []
    for engine, offering in found.offering.items():
        title, missing = FACTS[engine].title, offering.missing
        if found.offers[engine]:
            problems.append(f"{title}: {found.problems.get(engine, 'beyond a limit once predicted by request')}")
        elif missing.form is not None:
            parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in missing.parts.items())
            on = classes[missing.form.on[missing.stage]].kind
            problems.append(
                f"{title}: the closest form ({described(missing.form)}) lacks {missing.bytes / GIB:.1f} GiB: on each "
                f"{on} {parts} GiB of {missing.limit / GIB:.1f}"
            )
        else:
            reasons = found.refused[engine].most_common(1)
            problems.append(f"{title}: {reasons[0][0] if reasons else 'no form of a replica'}")
    return f"{model.name} on {class_names(classes)}: no plan. " + "; ".join(problems)


def described(form: Form) -> str:
    """Degrees as text."""
    d = form.shape.division
    parts = [f"tp {d.tp}"]
    parts += [f"dp {d.dp}"] if d.dp > 1 else []
    parts += [f"ep {d.moe_ep}"] if d.moe_ep > 1 else []
    parts += [f"pp {form.shape.pp}"] if form.shape.pp > 1 else []
    return " ".join(parts)

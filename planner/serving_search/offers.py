"""Offers: what one replica of a form does with so many requests in flight, if it fits in memory.

A replica with c requests in flight and S stages computes batches of b = c / S in turn, one in every stage. Stage s with
n of the L layers, on devices of class k, takes for each batch, with T_k(b) seconds of a decode step of the whole model
and p_k seconds of one prompt, n / L * (T_k(b) + b / osl * p_k): every sequence makes one token per turn and asks for a
prompt every osl tokens. A pipeline kept full gives

    TPOT = S * max over stages
    TTFT = prompt through all stages + half a turn of its first stage + wait, with rho = prompts/s * p,
           rho / (2 (1 - rho)) * p (Pollaczek-Khinchine, service of one length)
    tokens/s = c * osl / (TTFT + (osl - 1) * TPOT)

Layers are divided by the exact dynamic program of ``solvers.stages``, under each stage's memory. T is predicted for
powers of two and read between them along straight lines in logarithms, never beyond.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from ...solvers.result import Infeasible
from ...solvers.stages import split_stages
from ...spec.errors import MoeplanError
from ...spec.serving_load import ServingLoad
from .classes import DeviceClass
from .engines import FACTS, MEMORY_FRACTION
from .footprint import Division, Sizes, Step
from .forms import Form

MOST_IN_FLIGHT = 4096  # on one replica; engines' own default limits are lower


class Steps(Protocol):
    """Seconds of single steps of a whole model on one stage's devices; all data-parallel groups work alike."""

    def decode(self, batch: int) -> float:
        """One token for so many sequences, over all groups, at the load's mean context."""
        ...

    def prefill(self, prompts: int) -> float:
        """So many prompts, over all groups, from nothing."""
        ...


Times = Callable[[str, str, Division], Steps]
"""(engine, system, division of the stage) -> its steps. MoeplanError where no table says."""


@dataclass(frozen=True)
class Offer:
    """One replica. layers: [S]; ttft, tpot in seconds; tokens: per second, of output. exact: predicted request by
    request, not by the formulas above. Of a prefill worker tokens and tpot are 0, of a decode worker ttft is; requests:
    per second, that it answers or has its part in."""

    form: Form
    in_flight: int
    layers: tuple[int, ...]
    ttft: float
    tpot: float
    tokens: float
    requests: float
    exact: bool = False
    role: Literal["both", "prefill", "decode"] = "both"

    @property
    def per_gpu(self) -> float:
        return self.tokens / self.form.gpus

    def predicted(self, ttft: float, tpot: float, osl: int) -> "Offer":
        """The same with other times."""
        tokens = self.in_flight * osl / (ttft + tpot * (osl - 1))
        return replace(self, ttft=ttft, tpot=tpot, tokens=tokens, requests=tokens / osl, exact=True)


@dataclass(frozen=True)
class Known:
    """Of one class: decode steps at powers of two, as logarithms; seconds of a prompt, alone and as one of many."""

    batches: np.ndarray
    steps: np.ndarray
    prompt: float
    each: float

    def step(self, batch: float) -> float:
        return float(np.exp(np.interp(np.log(batch), self.batches, self.steps)))


@dataclass
class Missing:
    """The form that lacked the fewest bytes, of those that fit nowhere."""

    bytes: float = float("inf")
    form: Form | None = None
    stage: int = 0
    parts: dict[str, int] = field(default_factory=dict)
    limit: int = 0


class Offering:
    """Makes the offers of one engine; ``refused`` counts why forms have none, ``missing`` says what memory lacked."""

    def __init__(
        self, engine: str, sizes: Sizes, classes: Sequence[DeviceClass], load: ServingLoad, times: Times
    ) -> None:
        self.engine, self.sizes, self.classes, self.load, self.times = engine, sizes, classes, load, times
        self.layers = sum(block.count for block in sizes.model.blocks)
        self.refused: Counter[str] = Counter()
        self.missing = Missing()
        self._known: dict[tuple[str, Division], Known | str] = {}

    def offers(self, form: Form, counts: Sequence[int], even: bool = False) -> list[Offer]:
        """Of one form for these numbers of requests in flight, rising; even: layers as if all stages were equal."""
        if self._split(form, self._least(form), np.ones(form.shape.pp), even) is None:
            self.refused["its weights and the cache of a request do not fit"] += 1
            return []
        known = {c: self.known(self.classes[c].system, form.shape.division, counts[-1]) for c in set(form.on)}
        for one in known.values():
            if isinstance(one, str):
                self.refused[one] += 1
                return []
        stages = [one for c in form.on if not isinstance(one := known[c], str)]
        found = list[Offer]()
        for count in (c for c in counts if c >= self._least(form)):
            offer = self._offer(form, count, stages, even)
            if offer is None:
                break  # more requests need more memory
            found.append(offer)
        return found

    def fit(self, form: Form, count: int) -> tuple[int, ...] | None:
        """[S] layers of each stage, divided evenly; None where they do not fit."""
        return self._split(form, count, np.ones(form.shape.pp), even=True)

    def _least(self, form: Form) -> int:
        """Requests in flight below which a group or a stage stands idle."""
        return max(form.shape.division.dp, form.shape.pp)

    def _offer(self, form: Form, count: int, stages: Sequence[Known], even: bool) -> Offer | None:
        osl, S = self.load.osl, form.shape.pp
        batch = count / S
        steps = np.array([known.step(max(batch, form.shape.division.dp)) for known in stages])
        each = np.array([known.each for known in stages])
        prompt = np.array([known.prompt for known in stages])
        turn = steps + batch / osl * each
        layers = self._split(form, count, turn / self.layers, even)
        if layers is None:
            return None
        parts = np.array(layers) / self.layers
        tpot = float(S * (parts * turn).max()) + self._sends(form, batch)
        service = float((parts * each).max())
        rho = min(service * count / (tpot * osl), 0.99)
        ttft = float(parts @ prompt) + float(parts[0] * steps[0]) / 2 + rho / (2 * (1 - rho)) * service
        requests = count / (ttft + tpot * (osl - 1))
        return Offer(form, count, layers, ttft, tpot, requests * osl, requests)

    def _split(self, form: Form, count: int, seconds: np.ndarray, even: bool) -> tuple[int, ...] | None:
        """[S] layers of each stage; None where they do not fit. seconds: [S] of one layer."""
        division, stages = form.shape.division, form.shape.pp
        limits = np.array([MEMORY_FRACTION * self.classes[c].memory for c in form.on])
        cache = self.sizes.layer_cache(division, self.load.most_tokens)
        each = self.sizes.layer_weights(division) + cache * -(-count // division.dp)
        held = self.sizes.held(division, stages, self.step(count)).astype(float)
        halves = tuple(len(part) for part in np.array_split(np.arange(self.layers), stages))
        if not form.mixed or even:  # equal stages: even is fastest
            cuts = np.concatenate([[0], np.cumsum(halves)])
            lacking = [max(held[s] + each[cuts[s] : cuts[s + 1]].sum() - limits[s], 0.0) for s in range(stages)]
            if max(lacking) <= 0:
                return halves
            if stages == 1 or even:
                self._lacks(form, count, halves, lacking)
                return None
        try:
            table = np.broadcast_to(seconds[:, None], (stages, self.layers))
            sizes = np.broadcast_to(each.astype(float), (stages, self.layers))
            found = split_stages(table, np.zeros(stages), sizes, held, limits)
        except Infeasible as error:
            self._lacks(form, count, halves, error.per_device)
            return None
        return tuple(found.assignment.tolist())

    def step(self, in_flight: int) -> Step:
        """What the engine computes at once at most."""
        return Step(FACTS[self.engine].step_tokens, in_flight)

    def _lacks(self, form: Form, count: int, layers: tuple[int, ...], lacking: Sequence[float]) -> None:
        total = float(sum(lacking))
        if not 0 < total < self.missing.bytes:
            return
        stage = int(np.argmax(lacking))
        held = self.sizes.footprints(form.shape.division, layers, count, self.load.most_tokens, self.step(count))
        limit = int(MEMORY_FRACTION * self.classes[form.on[stage]].memory)
        self.missing = Missing(total, form, stage, held[stage].parts(), limit)

    def _sends(self, form: Form, batch: float) -> float:
        """Seconds that the hidden states of a batch travel between stages on different classes."""
        joints = [(a, b) for a, b in zip(form.on, form.on[1:], strict=False) if a != b]
        size = batch * self.sizes.model.blocks[-1].hidden_size * self.sizes.element
        return sum(size / min(self.classes[a].outside, self.classes[b].outside) for a, b in joints)

    def known(self, system: str, division: Division, most: int) -> Known | str:
        """Times of a class's devices for batches up to ``most``; or why there are none."""
        key = system, division
        if key not in self._known:
            try:
                self._known[key] = self._predict(self.times(self.engine, system, division), division, most)
            except MoeplanError as error:
                self._known[key] = str(error)
        return self._known[key]

    def _predict(self, steps: Steps, division: Division, most: int) -> Known:
        points = [division.dp << i for i in range(MOST_IN_FLIGHT.bit_length())]
        points = [p for p in points if p < 2 * max(most, division.dp)]
        prompts = division.dp
        alone = steps.prefill(prompts)
        many = max(1, FACTS[self.engine].step_tokens // self.load.isl) * division.dp
        each = alone / prompts if many == prompts else steps.prefill(many) / many
        return Known(np.log(points), np.log([steps.decode(p) for p in points]), alone, each)


def counts_of(load: ServingLoad, most_replicas: int) -> tuple[int, ...]:
    """Numbers of requests in flight that a replica is looked at with, rising.

    Of a given concurrency all up to 16, some fifty down from it, and equal shares of it between up to 16 replicas.
    """
    total = load.concurrency
    powers = [1 << i for i in range(MOST_IN_FLIGHT.bit_length())]
    if total is None:
        halves = [p + p // 2 for p in powers if p >= 2]
        return tuple(sorted({c for c in (*powers, *halves) if c <= MOST_IN_FLIGHT}))
    shares = [share for m in range(1, min(16, most_replicas) + 1) for share in (total // m, -(-total // m))]
    steps = [round(total * 2 ** (-i / 4)) for i in range(4 * 13)]
    every = -(-total // most_replicas)
    found = {*range(1, 17), *powers, *shares, *steps, every}
    return tuple(sorted(c for c in found if 1 <= c <= min(total, MOST_IN_FLIGHT)))

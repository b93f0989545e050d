"""Times of a served model: single steps, and the first and next tokens under a load."""

from functools import lru_cache

import numpy as np

from ...spec.errors import InfeasibleError, MoeplanError
from ...spec.model import Model
from ...spec.tabled import Tables
from .architecture import Architecture, of_model
from .capacity import cached_tokens
from .closed_loop import closed_loop
from .layers import Passes
from .lookup import Lookup
from .settings import defaults
from .shapes import Degrees, Load, Served, Settings, Step

PIECES = 3
"""Launches per layer of a step with prompts whose pieces between attentions are CUDA graphs."""


def predict(
    tables: Tables,
    system: str,
    engine: str,
    version: str | None,
    model: Model | Architecture,
    precision: str,
    degrees: Degrees,
    load: Load,
    settings: Settings | None = None,
    routing: str = "power_law_1.01",
) -> Served:
    """Times to the first token and between tokens of ``model`` served by ``engine`` on GPUs of type ``system``.

    ``precision``: bf16, fp8, fp4 or int4, as the weights are published. ``routing``: which distribution of the measured
    tables of experts, ``balanced`` or ``power_law_1.01`` or ``power_law_1.2``. Raises MoeplanError where no table has
    an operator.
    """
    settings = settings or defaults(engine)
    times = StepTimes(
        Lookup(tables, system, engine, version), _architecture(model), precision, degrees, settings, routing
    )
    if degrees.pp > 1:
        times.lookup.note(f"pp {degrees.pp}: stages counted one after the other, without what they overlap or send")
    room = cached_tokens(times.model, times.passes.formats, degrees, settings, times.lookup.system.memory_bytes)
    if room < load.isl + load.osl:
        raise InfeasibleError(
            f"{times.model.name} on {degrees.gpus} x {system}: the weights leave room for "
            f"{max(int(room), 0)} of {load.isl + load.osl} tokens of one request; use more GPUs or fewer bits"
        )
    run = closed_loop(load, settings, times.seconds, degrees.dp, room)
    step = times.parts(run.mean_batch, run.mean_context)
    return Served(
        ttft_s=float(run.ttft.mean()),
        tpot_s=float(run.tpot.mean()),
        tokens_per_s_per_gpu=run.tokens / run.seconds / degrees.gpus,
        parts=step.parts,
        origins=tuple(times.lookup.origins),
        notes=tuple(times.lookup.notes),
        ttft_median_s=float(np.median(run.ttft)),
        tpot_median_s=float(np.median(run.tpot)),
        settings=settings,
    )


def step(
    tables: Tables,
    system: str,
    engine: str,
    version: str | None,
    model: Model | Architecture,
    precision: str,
    degrees: Degrees,
    *,
    decodes: int = 0,
    context: float = 0,
    prompts: int = 0,
    prompt: float = 0,
    settings: Settings | None = None,
    routing: str = "power_law_1.01",
) -> float:
    """Seconds of one step in which ``decodes`` sequences of ``context`` tokens get one token more, and beside them
    ``prompts`` prompts of ``prompt`` tokens are computed. Counted over all attention copies."""
    if decodes < 0 or prompts < 0 or not decodes + prompts or (prompts and prompt < 1) or (decodes and context < 1):
        raise MoeplanError("step: needs sequences with a context, or prompts with tokens")
    settings = settings or defaults(engine)
    lookup = Lookup(tables, system, engine, version)
    times = StepTimes(lookup, _architecture(model), precision, degrees, settings, routing)
    return times.seconds(decodes, context, prompts, prompts * prompt, 0)


def _architecture(model: Model | Architecture) -> Architecture:
    return model if isinstance(model, Architecture) else of_model(model)


class StepTimes:
    """Seconds of any step, from passes at a few sizes."""

    def __init__(
        self, lookup: Lookup, model: Architecture, precision: str, degrees: Degrees, settings: Settings, routing: str
    ) -> None:
        self.lookup, self.degrees, self.model, self.settings = lookup, degrees, model, settings
        self.passes = Passes(lookup, model, precision, degrees, settings, routing)
        self.tokenwise = lru_cache(None)(self._tokenwise)
        self.decoding = lru_cache(None)(self._decoding)
        self.prefilling = lru_cache(None)(self._prefilling)
        self.host = lookup.host_call()

    def seconds(self, batch: float, context: float, prompts: float, tokens: float, before: float) -> float:
        """One step: ``batch`` sequences of ``context`` tokens decode, ``prompts`` prompts get ``tokens`` tokens more.

        ``before``: tokens of each prompt that earlier steps have computed. All counted over the attention copies.
        """
        dp = self.degrees.dp
        own = -(-batch // dp)
        total = 0.0
        if batch:
            total += self.decoding(own, _rounded(context))
        if not prompts:
            return total + self._between(own, own, True)
        share = -(-prompts // dp)
        length = tokens / prompts
        end = self.prefilling(share, _rounded(before + length))
        total += end - (self.prefilling(share, _rounded(before)) if before >= 1 else 0.0)
        fresh = share * length
        graph = fresh + own <= self.settings.graph_tokens
        total += self._between(fresh + own, share + own, graph)
        return max(total, self._host(graph))

    def parts(self, batch: float, context: float) -> Step:
        """One step that decodes, by part."""
        own = -(-batch // self.degrees.dp)
        parts: dict[str, float] = dict(self.passes.tokenwise(own, own, True))
        parts["attention"] = self.decoding(own, _rounded(context))
        return Step(parts)

    def _host(self, graph: bool) -> float:
        """Seconds in which the host can launch a step with prompts."""
        calls = PIECES if graph else self.settings.calls
        return self.host * calls * self.model.depth

    def _between(self, tokens: float, rows: float, graph: bool) -> float:
        """``tokenwise`` between the sizes at which it is computed."""
        low, high = _bracket(tokens)
        share = (tokens - low) / (high - low) if high > low else 0.0
        one = self.tokenwise(low, min(rows, low), graph)
        return one if not share else one + (self.tokenwise(high, min(rows, high), graph) - one) * share

    def _tokenwise(self, tokens: float, rows: float, graph: bool) -> float:
        return sum(self.passes.tokenwise(tokens, rows, graph).values())

    def _decoding(self, batch: float, context: float) -> float:
        return self.passes.decoding(batch, context)

    def _prefilling(self, batch: float, tokens: float) -> float:
        return self.passes.prefilling(batch, tokens)


def _rounded(value: float) -> float:
    """To within 1.6 %: so many sizes are enough."""
    if value < 64:
        return float(max(round(value), 1))
    step = 2.0 ** (int(np.log2(value)) - 5)
    return round(value / step) * step


def _bracket(tokens: float) -> tuple[float, float]:
    """The sizes on both sides of ``tokens`` among 1, 2, 3, 4, 6, 8, 12, ..."""
    if tokens <= 1:
        return 1.0, 1.0
    power = 2.0 ** int(np.log2(tokens))
    if tokens == power:
        return power, power
    middle = 1.5 * power
    return (power, middle) if tokens <= middle else (middle, 2 * power)

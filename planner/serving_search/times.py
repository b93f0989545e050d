"""Times for the search from measured tables: single steps for every form, whole loads for what is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from ...spec.model import Model
from ...spec.serving_load import ServingLoad
from ...spec.tabled import Tables
from ..serving.architecture import of_model
from ..serving.closed_loop import closed_loop
from ..serving.lookup import Lookup
from ..serving.predict import StepTimes
from ..serving.settings import defaults
from ..serving.shapes import Degrees, Load
from .classes import DeviceClass
from .engines import FACTS
from .footprint import Division
from .offers import Offer, Steps
from .plan import Predictor
from .precision import Precision

ROUTING = "power_law_1.01"


@dataclass(frozen=True)
class _Steps:
    """Steps of one division, at the load's lengths."""

    times: StepTimes
    load: ServingLoad

    def decode(self, batch: int) -> float:
        return float(self.times.seconds(batch, self.load.isl + self.load.osl / 2, 0, 0, 0))

    def prefill(self, prompts: int) -> float:
        return float(self.times.seconds(0, 0, prompts, prompts * self.load.isl, 0))


def predictor_of(tables: Tables, source: str, model: Model, precision: Precision, load: ServingLoad) -> Predictor:
    """From tables; model and precision as it is served. Raises MoeplanError where nothing is known of the model."""
    architecture = of_model(model)

    @cache
    def lookup(engine: str, system: str) -> Lookup:
        return Lookup(tables, system, FACTS[engine].tables, None)

    @cache
    def steps(engine: str, system: str, division: Division) -> StepTimes:
        degrees = Degrees(tp=division.tp, dp=division.dp, moe_tp=division.moe_tp, moe_ep=division.moe_ep)
        known = lookup(engine, system)
        return StepTimes(known, architecture, precision, degrees, defaults(engine), ROUTING)

    def times(engine: str, system: str, division: Division) -> Steps:
        return _Steps(steps(engine, system, division), load)

    def exact(engine: str, offer: Offer, classes: Sequence[DeviceClass]) -> tuple[float, float]:
        division = offer.form.shape.division
        closed = Load(load.isl, max(load.osl, 2), offer.in_flight)
        found = steps(engine, classes[offer.form.on[0]].system, division)
        run = closed_loop(closed, defaults(engine), found.seconds, division.dp)
        return float(run.ttft.mean()), float(run.tpot.mean())

    return Predictor(times, exact, source)

"""How a cluster was measured, and how far its curves can be believed."""

from pydantic import Field, PositiveInt

from ..document import Part
from ..load import Load


class CurveNoise(Part):
    """How far repeated measurements of one operator, collective, or the links lay apart."""

    curve: str = Field(description="operator and dtype, collective, or links")
    points: PositiveInt = Field(description="measured, on all devices")
    noisy: int = Field(ge=0, description="points whose spread is above 0.5")
    typical: float = Field(ge=0, description="median of the points' spreads")
    worst: float = Field(ge=0, description="largest of the points' spreads")
    disturbed: int = Field(0, ge=0, description="points that other programs never left alone for long enough")


class Provenance(Part):
    """How, when and with what it was measured."""

    created: str
    command: str
    versions: dict[str, str]
    seconds: float
    models: tuple[str, ...] = Field(description="names of the models whose shapes were measured")
    warnings: tuple[str, ...] = ()
    load: Load | None = Field(None, description="what others took of the processors while it was measured")
    waited: float = Field(0.0, ge=0, description="seconds spent waiting for other programs to be done")
    noise: tuple[CurveNoise, ...] = ()
    spread_limit: float | None = Field(None, description="typical spread beyond which a curve was not to be used")
    disturbed_limit: float | None = Field(None, description="part of its points disturbed beyond which it was not")
    noise_accepted: bool = Field(False, description="whether curves beyond the limit were kept all the same")

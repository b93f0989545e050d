"""Counted: what is known of a layer only by its size."""

from pydantic import Field, model_validator

from .document import Part


class Stored(Part):
    """Matrices that are stored in a format of their own, by their size."""

    name: str = Field(description="such as fp8, int4, mxfp4; several, separated by commas")
    values: int = Field(ge=1, le=2**50, description="weights in these matrices")
    bytes: int = Field(ge=1, le=2**52, description="that they take, scales included")


class Peak(Part):
    """Values of one sequence at the fullest moment of a layer, in the dtype that the model computes in.

    Prompts of L tokens: token L + pair L L; one new token after a context: step + position for each token before it.
    """

    token: float = Field(ge=0, le=2**40)
    pair: float = Field(ge=0, le=2**40, description="such as scores of attention without a fused kernel, masks")
    step: float = Field(ge=0, le=2**50)
    position: float = Field(ge=0, le=2**40)

    def values(self, length: int, context: int) -> float:
        """For ``length`` new tokens after ``context`` others."""
        if context:
            return length * (self.step + self.position * context)
        return self.token * length + self.pair * length * length


class Counted(Part):
    """Everything of a block but its routed experts, known only by its size: of families read through Transformers."""

    made_of: str = Field(description="class of the layer in Transformers")
    parameters: int = Field(ge=0, le=2**50, description="router, shared experts, attention or another mixer, norms")
    cache_values: int = Field(
        0, ge=0, lt=2**31, description="elements that attention caches per token, by its projections' names"
    )
    storage: Stored | None = Field(None, description="of these parameters, those not stored in the model's dtype")
    kind: str = Field(
        "", max_length=200, description="what its mixer is, by the configuration: full_attention, linear_attention, ..."
    )
    signature: str = Field(
        "", max_length=64, description="digest of the layer's modules, sizes and switches: layers of one take one time"
    )
    experts: str = Field("", max_length=64, description="the same of its routed experts, empty without any")
    whole_outputs: bool = Field(False, description="a norm follows every expert, which needs all of its columns")
    held_values: int = Field(
        0, ge=0, lt=2**31, description="elements that Transformers' cache holds per token, whatever engines hold"
    )
    state_values: int = Field(
        0, ge=0, lt=2**40, description="elements of the state of fixed size that it holds per sequence"
    )
    widths: int = Field(0, ge=0, lt=2**31, description="outputs of all its projections per token, for activations")
    peak: Peak | None = Field(None, description="what Transformers' layer holds while it computes, experts left out")

    @model_validator(mode="after")
    def _consistent(self) -> "Counted":
        if self.storage and self.storage.values > self.parameters:
            raise ValueError(f"storage.values ({self.storage.values}) exceeds parameters ({self.parameters})")
        return self

    def stored_bytes(self, element_bytes: int) -> int:
        """Bytes of all of it as stored."""
        values, size = (self.storage.values, self.storage.bytes) if self.storage else (0, 0)
        return (self.parameters - values) * element_bytes + size

"""Counted: what is known of a layer only by its size."""

from pydantic import Field

from .document import Part


class Counted(Part):
    """Everything of a block but its routed experts, known only by its size: of families read through Transformers."""

    made_of: str = Field(description="class of the layer in Transformers")
    parameters: int = Field(ge=0, le=2**50, description="router, shared experts, attention or another mixer, norms")
    cache_values: int = Field(
        0, ge=0, lt=2**31, description="elements that attention caches per token, by its projections' names"
    )

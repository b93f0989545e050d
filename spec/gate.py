"""Gate: how tokens and experts find each other; what computes it is ``runtime.gates``."""

from typing import Literal

from pydantic import Field, model_validator

from .document import Part
from .storage import Extent


class Gate(Part):
    """How a token chooses its experts and weighs them."""

    score: Literal["softmax", "sigmoid", "softmax_topk", "noisy_topk", "cosine", "expert_choice", "own"] = Field(
        "softmax",
        description="softmax over all experts, sigmoid, softmax over the chosen top-k only, the same with noise "
        "in training (GShard), softmax of cosines (X-MoE), experts choose tokens, or own: the family's, which only "
        "Transformers computes",
    )
    rank: Extent | None = Field(None, description="cosine: dimension that tokens and experts are compared in")
    normalize: bool = Field(True, description="gate weights of the chosen experts are divided by their sum")
    scale: float = Field(1.0, gt=0, description="factor on the gate weights (routed scaling factor)")
    bias: bool = Field(False, description="the router's linear layer has a bias")
    correction_bias: bool = Field(
        False, description="a bias per expert enters the choice, not the weight (DeepSeek-V3)"
    )
    groups: Extent = Field(1, description="group-limited routing: groups of experts")
    top_groups: Extent = Field(1, description="group-limited routing: groups a token may use")

    @model_validator(mode="after")
    def _consistent(self) -> "Gate":
        if (self.score == "cosine") != (self.rank is not None):
            raise ValueError("rank belongs to score cosine, and only there")
        if self.score == "cosine" and self.bias:
            raise ValueError("a cosine gate has no bias")
        if self.score == "expert_choice" and (self.groups > 1 or self.correction_bias):
            raise ValueError("experts that choose tokens have neither groups nor a correction bias")
        return self

    def parameters(self, hidden: int, outputs: int) -> int:
        """Values of a gate for so many experts."""
        matrix = hidden * outputs * (2 if self.score == "noisy_topk" else 1)
        if self.rank is not None:
            matrix = self.rank * (hidden + outputs) + 1  # projection, experts' embeddings, temperature
        return matrix + outputs * (self.bias + self.correction_bias)

"""What the user knows of a recording and it may not tell."""

from dataclasses import dataclass, replace

from ....spec.errors import DocumentError
from .facts import ModelFacts


@dataclass(frozen=True)
class Options:
    """What the user knows: each is a check where the record tells it too.

    layers: layers in the record, with or without experts. zero_experts: identity experts, whose ids follow those of
    ``num_experts`` real ones. highest_logits: whether the model is known to take the experts with the highest logits.
    """

    top_k: int | None = None
    num_experts: int | None = None
    layers: int | None = None
    zero_experts: int | None = None
    model: ModelFacts | None = None
    highest_logits: bool = True

    @property
    def model_name(self) -> str:
        return self.model.name if self.model else ""

    def with_model(self) -> "Options":
        """The model's numbers where the user gave none; raises DocumentError where both are given and differ.

        ``layers`` stays the user's: a record may hold all of a model's layers, or only those with experts.
        """
        model = self.model
        if model is None:
            return self
        where = f"model {model.name}"
        for name, told, given in (
            ("top-k", model.top_k, self.top_k),
            ("num-experts", model.num_experts, self.num_experts),
            ("zero-experts", model.zero_experts, self.zero_experts),
        ):
            if told is not None and given not in (None, told):
                raise DocumentError(f"{where}: {name} is {told}, --{name} says {given}")
        if self.layers is not None and model.layers and self.layers not in (model.layers, model.expert_layers):
            raise DocumentError(
                f"{where}: {model.layers} layers, {model.expert_layers} with experts, --layers says {self.layers}"
            )
        return replace(
            self,
            top_k=self.top_k if model.top_k is None else model.top_k,
            num_experts=self.num_experts if model.num_experts is None else model.num_experts,
            zero_experts=self.zero_experts if model.num_experts is None else model.zero_experts,
        )


def agree(name: str, told: int, given: int | None, where: str) -> None:
    """What the user gave must be what the record tells."""
    if given not in (None, told):
        raise DocumentError(f"{where}: {name} is {told} in the record, --{name} says {given}")

"""What the user's model tells where a recording does not: layers, experts, top-k, how it chooses."""

from dataclasses import dataclass
from pathlib import Path

from ....spec.catalogue import load_model
from ....spec.document import parse_object, read_text
from ....spec.errors import MoeplanError
from ....spec.model import Model

FAMILY_OF_TWO_BLOCKS = "longcat_flash"  # a layer of it is two blocks of moeplan's Model, as engines count one


@dataclass(frozen=True)
class ModelFacts:
    """A model's numbers; None where the model's reader does not know the family.

    layers: all layers as engines count them; expert_layers: those with experts; zero_experts: identity experts, whose
    ids follow those of the ``num_experts`` real ones.
    """

    name: str
    family: str
    layers: int | None = None
    expert_layers: int | None = None
    num_experts: int | None = None
    zero_experts: int = 0
    top_k: int | None = None


def model_facts(name_or_path: str) -> ModelFacts:
    """Facts of a catalogue model, or of a Hugging Face configuration of any family.

    Raises MoeplanError for what is neither.
    """
    try:
        return _of(load_model(name_or_path))
    except MoeplanError as unreadable:
        path = Path(name_or_path)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise
        family = parse_object(read_text(path), str(path)).get("model_type")
        if not isinstance(family, str) or not family.isidentifier():
            raise unreadable from None
        return ModelFacts(path.resolve().parent.name, family)


def _of(model: Model) -> ModelFacts:
    moe = model.moe_block().moe
    assert moe is not None
    halved = 2 if model.family == FAMILY_OF_TWO_BLOCKS else 1
    return ModelFacts(
        model.name,
        model.family,
        len(model.layers) // halved,
        len(model.moe_layers),
        moe.num_experts,
        moe.zero_experts,
        moe.top_k,
    )

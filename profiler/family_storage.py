"""How a family that Transformers reads is stored under a quantisation scheme, by the names of its modules.

A scheme covers linear layers and experts. Everything else of a layer (norms, routers that are no linear layer,
convolutions, states) keeps the dtype, and so do the embedding and what else is outside the layers.
"""

from torch import nn

from ..spec.catalogue.stored import Scheme
from ..spec.counted import Stored
from ..spec.storage import Storage

# What stands before "layers" in checkpoints: of the model alone, as the text part of another one, of Nemotron-H.
PREFIXES = ("model.", "language_model.model.", "model.language_model.", "language_model.", "backbone.", "")
# Of one expert, where a checkpoint has each by itself.
EACH = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def rest_storage(scheme: Scheme, layer: nn.Module, index: int, experts: nn.Module | None) -> Stored | None:
    """The linear layers of a layer, routed experts left out, that the scheme stores; None where there are none."""
    names: dict[str, None] = {}
    values = size = 0
    for name, module in layer.named_modules():
        if not isinstance(module, nn.Linear) or _inside(module, experts):
            continue
        storage = scheme.matrix(index, _known_as(index, name))
        if storage is not None:
            rows, columns = module.weight.shape
            names[storage.name] = None
            values += rows * columns
            size += storage.bytes((rows, columns))
    return Stored(name=", ".join(names), values=values, bytes=size) if values else None


def experts_storage(scheme: Scheme, index: int, name: str, count: int, gated: bool) -> Storage | None:
    """Storage of a layer's experts, ``name`` that of their module inside the layer; None where they keep the dtype.

    Raises DocumentError where matrices differ in their format, or some experts are stored and others are not.
    """
    part = scheme.for_layer(index)
    together = {"gate": "gate_up_proj", "up": "gate_up_proj" if gated else "up_proj", "down": "down_proj"}
    found = []
    for expert in (0, count - 1):
        matrices = {
            matrix: (*_known_as(index, f"{name}.{expert}.{own}"), *_known_as(index, f"{name}.{together[matrix]}"))
            for matrix, own in EACH.items()
            if gated or matrix != "gate"
        }
        found.append(part("experts", matrices))
    if found[0] != found[1]:
        raise scheme.error(f"layer {index}: some experts are quantised and others are not, which is not supported")
    return found[0]


def _known_as(index: int, name: str) -> tuple[str, ...]:
    return tuple(f"{prefix}layers.{index}.{name}" for prefix in PREFIXES)


def _inside(module: nn.Module, experts: nn.Module | None) -> bool:
    return experts is not None and any(module is each for each in experts.modules())

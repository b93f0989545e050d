"""The weight format in which a model is served: its own, or one that is asked for by name."""

from typing import Any, Literal, get_args

from ...spec.errors import MoeplanError
from ...spec.model import Block, Model
from ...spec.storage import PerBlock, Storage

Precision = Literal["bf16", "fp8", "fp4", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

FORMATS: dict[Precision, Storage] = {
    "fp8": Storage(name="fp8", bits=8, beside=(PerBlock(what="scale", bits=32, rows=128, columns=128),)),
    "fp4": Storage(name="fp4", bits=4, beside=(PerBlock(what="scale", bits=8, rows=1, columns=16),)),
    "int4": Storage(name="int4", bits=4, beside=(PerBlock(what="scale", bits=16, rows=1, columns=32),)),
}
# Published checkpoints in 4 bits keep attention in 16: there are few weights in it, and it is sensitive.
OF_ALL_PARTS = ("fp8",)


def precision_of(model: Model) -> Precision:
    """By the name of the format of the experts' weights. MoeplanError where no table is of such a format."""
    name = model.stored_in().get("experts", "")
    if not name:
        return "bf16"
    known: dict[str, Precision] = {"fp8": "fp8", "fp4": "fp4", "int4": "int4", "float8": "fp8", "float4": "fp4"}
    found = next((precision for part, precision in known.items() if part in name.lower()), None)
    if found is None:
        raise MoeplanError(
            f"model {model.name!r} stores its experts as {name}, of which there are no tables: "
            f"choose --precision {', '.join(PRECISIONS)}"
        )
    return found


def in_precision(model: Model, precision: Precision | None) -> Model:
    """The model as it is served: with the formats of its own, or all of it in this one."""
    if precision is None or (precision == precision_of(model) and model.stored_in()):
        return model
    storage = FORMATS.get(precision)
    blocks = tuple(_stored(block.dequantised(), storage, precision in OF_ALL_PARTS) for block in model.blocks)
    return model.model_copy(update={"blocks": blocks, "head_storage": None, "dtype": "bf16"})


def _stored(block: Block, storage: Storage | None, attention: bool) -> Block:
    if storage is None:
        return block
    changed: dict[str, Any] = {}
    if block.moe:
        changed["moe"] = block.moe.model_copy(update={"storage": storage, "shared_storage": storage})
    if block.dense:
        changed["dense"] = block.dense.model_copy(update={"storage": storage})
    if block.attention and attention:
        changed["attention"] = block.attention.model_copy(update={"storage": storage})
    return block.model_copy(update=changed)

"""Routed experts of a checkpoint, in the three forms that they are stored in.

- One tensor per expert and projection: what the hub holds and Transformers writes.
- Fused, as Transformers' modules: ``mlp.experts.gate_up_proj`` [E, 2 H, D] and ``mlp.experts.down_proj`` [E, D, H].
- mxfp4 blocks, as gpt-oss.

Identity (zero) experts come after the real ones and have no weights that act: Transformers 5.23 saves LongCat's with
rows of gate and up, in both forms, though they have no down projection. Those rows are never read.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ..spec.errors import DocumentError, MoeplanError
from ..spec.model import Block, Moe
from .dequantise import ScaledReader
from .dequantise.mxfp4 import Mxfp4Experts
from .weights import Range


class Names(NamedTuple):
    """Names inside ``model.layers.{i}.`` that differ between families."""

    moe: str
    gate: str
    up: str
    down: str


_PROJECTIONS = Names("mlp", "gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "mixtral": Names("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": _PROJECTIONS,
    "qwen3_moe": _PROJECTIONS,
    "olmoe": _PROJECTIONS,
    "scmoe": _PROJECTIONS,  # no hub has one: a Qwen2-MoE with a shortcut
}
FUSED = "mlp.experts"
Parts = tuple[Tensor, Tensor, Tensor]  # gate [H, D], up [H, D], down [D, H]


def read_experts(
    reader: ScaledReader, prefix: str, names: Names, block: Block, experts: Sequence[int], columns: Range
) -> Iterator[Parts]:
    """The parts of each of these experts, columns [first, last) of the FFN only, in the order asked for.

    prefix: "model.layers.0.". Raises DocumentError for tensors that are missing or do not fit, MoeplanError for the
    number of an identity expert.
    """
    moe = block.moe
    assert moe is not None
    for e in experts:
        if not 0 <= e < moe.num_experts:
            identity = f"{moe.num_experts} to {moe.num_experts + moe.zero_experts - 1} are identity experts, "
            raise MoeplanError(
                f"{prefix}: expert {e} has no weights: {identity if moe.zero_experts else ''}0 to "
                f"{moe.num_experts - 1} are real"
            )
    fused = f"{prefix}{FUSED}"
    if f"{fused}.gate_up_proj_blocks" in reader:
        return _mxfp4(reader, fused, block.hidden_size, moe, experts, columns)
    if f"{fused}.gate_up_proj" in reader:
        return _fused(reader, fused, block.hidden_size, moe, experts, columns)
    return _single(reader, f"{prefix}{names.moe}.experts.", names, block.hidden_size, moe, experts, columns)


def _single(
    reader: ScaledReader, prefix: str, names: Names, hidden: int, moe: Moe, experts: Sequence[int], columns: Range
) -> Iterator[Parts]:
    wide, tall = (moe.ffn_size, hidden), (hidden, moe.ffn_size)
    for e in experts:
        yield (
            reader.read(f"{prefix}{e}.{names.gate}.weight", wide, (columns, (0, hidden))),
            reader.read(f"{prefix}{e}.{names.up}.weight", wide, (columns, (0, hidden))),
            reader.read(f"{prefix}{e}.{names.down}.weight", tall, ((0, hidden), columns)),
        )


def _fused(
    reader: ScaledReader, name: str, hidden: int, moe: Moe, experts: Sequence[int], columns: Range
) -> Iterator[Parts]:
    first, last = columns
    rows = _stored_experts(reader, f"{name}.gate_up_proj", moe)
    wide, tall = (rows, 2 * moe.ffn_size, hidden), (moe.num_experts, hidden, moe.ffn_size)
    up = (moe.ffn_size + first, moe.ffn_size + last)
    for e in experts:
        yield (
            reader.read(f"{name}.gate_up_proj", wide, ((e, e + 1), columns, (0, hidden)))[0],
            reader.read(f"{name}.gate_up_proj", wide, ((e, e + 1), up, (0, hidden)))[0],
            reader.read(f"{name}.down_proj", tall, ((e, e + 1), (0, hidden), columns))[0],
        )


def _stored_experts(reader: ScaledReader, name: str, moe: Moe) -> int:
    """Experts that the fused tensor has rows for: the real ones, and identity experts or not."""
    shape = reader.folder.stored(name).shape
    with_identity = moe.num_experts + moe.zero_experts
    return with_identity if shape and shape[0] == with_identity else moe.num_experts


def _mxfp4(
    reader: ScaledReader, name: str, hidden: int, moe: Moe, experts: Sequence[int], columns: Range
) -> Iterator[Parts]:
    if reader.quantization is None or reader.quantization.scheme != "mxfp4":
        raise DocumentError(f"{reader.folder.folder}: {name}: mxfp4 blocks, but config.json does not name mxfp4")
    blocks = Mxfp4Experts(reader.folder, name, dry=reader.dry)
    blocks.check(moe.num_experts, hidden, moe.ffn_size)
    for e in experts:
        both, down = blocks.read(e, columns)
        yield both[0], both[1], down

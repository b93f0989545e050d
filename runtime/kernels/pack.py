"""gpt-oss's experts, as Transformers and its checkpoints keep them, packed for the kernels: once, by an explicit call.

There gate and up are interleaved columns of one matrix, and both matrices are transposed; the kernels read rows.
Letters: D model, E experts, H ffn columns.
"""

from typing import NamedTuple

from torch import Tensor

from ...spec import MoeplanError


class Packed(NamedTuple):
    """What ``expert_ffn`` takes: gate_up [E, 2, H, D], its bias [E, 2, H] or None, down [E, D, H]."""

    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor

    @property
    def bytes(self) -> int:
        """Memory of the copies; the originals' is free once nobody holds them."""
        return sum(t.nbytes for t in self if t is not None)


def pack_interleaved(gate_up_proj: Tensor, down_proj: Tensor, *, gate_up_proj_bias: Tensor | None = None) -> Packed:
    """gate_up_proj: [E, D, 2 H], columns gate 0, up 0, gate 1, up 1, ...; down_proj: [E, H, D]; gate_up_proj_bias:
    [E, 2 H], interleaved likewise -> contiguous copies of the same type. A bias of down stays as it is.

    Raises MoeplanError for shapes that do not go together.
    """
    if gate_up_proj.ndim != 3 or gate_up_proj.shape[2] % 2:
        raise MoeplanError(f"pack_interleaved: gate_up_proj: expected [E, D, 2 H], got {list(gate_up_proj.shape)}")
    experts, model, columns = gate_up_proj.shape
    for name, tensor, shape in (
        ("down_proj", down_proj, [experts, columns // 2, model]),
        ("gate_up_proj_bias", gate_up_proj_bias, [experts, columns]),
    ):
        if tensor is not None and list(tensor.shape) != shape:
            raise MoeplanError(f"pack_interleaved: {name}: expected {shape}, got {list(tensor.shape)}")
    return Packed(
        gate_up_proj.reshape(experts, model, -1, 2).permute(0, 3, 2, 1).contiguous(),
        None if gate_up_proj_bias is None else gate_up_proj_bias.reshape(experts, -1, 2).transpose(1, 2).contiguous(),
        down_proj.transpose(1, 2).contiguous(),
    )

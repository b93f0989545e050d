"""The part of a layer's experts that one device keeps. Letters as in ``form``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .form import Form


def own_part(
    tensors: Sequence[Tensor], form: Form, experts: Sequence[int], columns: tuple[int, int], adds_bias: bool
) -> list[Tensor]:
    """Of a module's tensors, in the order of ``Form.names``, these experts and FFN columns [first, end).

    adds_bias: this device adds the output's bias; of the devices that share an expert's columns one does.
    """
    chosen = [_chosen(tensor.detach(), experts) for tensor in tensors]
    if columns == (0, form.ffn):
        return chosen
    axis = 2 if form.transposed else 1
    parts = [_wide(chosen[0], form, columns, axis), chosen[1].narrow(3 - axis, columns[0], columns[1] - columns[0])]
    if form.bias:
        parts += [_wide(chosen[2], form, columns, 1), chosen[3] if adds_bias else torch.zeros_like(chosen[3])]
    return [part.contiguous() for part in parts]


def _chosen(tensor: Tensor, experts: Sequence[int]) -> Tensor:
    if list(experts) == list(range(len(tensor))):
        return tensor
    return tensor.index_select(0, torch.tensor(list(experts), dtype=torch.long, device=tensor.device))


def _wide(tensor: Tensor, form: Form, columns: tuple[int, int], axis: int) -> Tensor:
    """The columns of gate and up, both as they lay."""
    first, count = columns[0], columns[1] - columns[0]
    if form.gated and form.concatenated:
        return torch.cat([tensor.narrow(axis, first, count), tensor.narrow(axis, form.ffn + first, count)], dim=axis)
    return tensor.narrow(axis, form.matrices * first, form.matrices * count)

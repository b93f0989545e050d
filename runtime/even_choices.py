"""Choices that give every expert equally many rows: what the grouped FFN is timed with."""

import torch
from torch import Tensor


def even_choices(experts: int, tokens: int, top_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [T, top_k] int32 and gate weights [T, top_k] f32 by which each of ``experts`` gets ``tokens`` rows.

    A row goes to as many of them as ``top_k`` allows; the rest of its choices are -1, no expert. T: the fewest rows.
    """
    used = min(top_k, experts)
    count = -(-experts * tokens // used)
    flat = torch.arange(count * top_k).view(count, top_k)
    k = flat % top_k
    nth = flat // top_k * used + k
    ids = torch.where((k < used) & (nth < experts * tokens), nth % experts, -1).to(torch.int32).to(device)
    return ids, torch.full(ids.shape, 1 / top_k, device=device)

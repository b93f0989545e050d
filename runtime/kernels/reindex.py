"""Choices in the order of their experts: how kernels find the rows of one expert without moving any.

Letters: T tokens, E experts, K top-k, P = T K choices; choice p is token p // K, place p % K.
"""

import torch
from torch import Tensor

from ...spec import MoeplanError


def by_expert(ids: Tensor, experts: int, function: str) -> tuple[Tensor, list[int]]:
    """Choices that are here, sorted by expert and by token within one, and how many each expert has.

    ids: [T, K] int32 or int64, -1 for an expert that is not here -> order [at most P] int64, E counts. Raises
    MoeplanError for an id outside -1..E-1, in the name of ``function``.
    """
    flat = ids.reshape(-1)
    check_ids(flat, experts, function)
    elsewhere, *counts = torch.bincount(flat + 1, minlength=experts + 1).tolist()
    return flat.argsort(stable=True)[elsewhere:], counts


def active_experts(ids: Tensor, experts: int, function: str) -> list[int]:
    """Those that have choices, in order. ids and errors as in ``by_expert``."""
    check_ids(ids, experts, function)
    counts = torch.bincount(ids.reshape(-1) + 1, minlength=experts + 1)
    return counts[1:].nonzero().flatten().tolist()


def check_ids(ids: Tensor, experts: int, function: str) -> None:
    """Raises MoeplanError, in the name of ``function``, for an id outside -1..E-1."""
    if ids.numel():
        least, most = (int(end) for end in torch.aminmax(ids))
        if least < -1 or most >= experts:
            raise MoeplanError(f"{function}: ids: expected -1..{experts - 1}, got {least if least < -1 else most}")

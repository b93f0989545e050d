"""Ids out of range, without waiting for the device.

The kernel that counts ids writes one that is out of range into host memory that the device can reach; each call looks
there. On a GPU the error thus comes with a later call, as the device runs behind; the id itself is computed as if its
expert were not here, so nothing outside the tensors is read.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ....spec import MoeplanError

NOTHING = -1


@lru_cache
def report(device: torch.device) -> Tensor:
    """[2] int64 on the host: an id out of range, or -1, and the number of experts of its call."""
    return torch.full((2,), NOTHING, dtype=torch.int64, pin_memory=device.type == "cuda")


def raise_reported(device: torch.device, function: str) -> None:
    """MoeplanError, once, in the name of ``function``, if an id out of range was reported."""
    seen = report(device)
    wrong, experts = seen.tolist()
    if wrong != NOTHING:
        seen.fill_(NOTHING)
        when = ", perhaps in an earlier call" if device.type == "cuda" else ""
        raise MoeplanError(f"{function}: ids: expected -1..{experts - 1}, got {wrong}{when}")

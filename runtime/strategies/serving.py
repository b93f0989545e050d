"""Who serves what: the tables by which a token's choices find their devices.

E experts, G devices, P phases of the copy table.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...spec.plan import LayerPlan
from ...spec.routing import copy_table


class Serving(NamedTuple):
    """Who serves what, seen from one device: expert [E + 1, P] -> device, and the expert's index among that device's.

    The last entries (G, -1) are those of expert -1, which no device serves. The tables are [E + 1] where no expert is
    replicated.
    """

    device: Tensor
    slot: Tensor
    devices: int


def place_of(plan: LayerPlan, experts: int) -> np.ndarray:
    """[G, E] an expert's index among each device's; -1 where it is not there."""
    index = np.full((len(plan.slots), experts), -1, np.int64)
    for g, own in enumerate(plan.slots):
        index[g, list(own)] = np.arange(len(own))
    return index


def serving(plan: LayerPlan, hosts: list[int], num_experts: int, rank: int, device: torch.device) -> Serving:
    """The tables of ``rank``."""
    served = copy_table(plan.slots, plan.shares, hosts, num_experts)[rank].astype(np.int64)
    slot = place_of(plan, num_experts)[served, np.arange(num_experts)[:, None]]
    if sum(map(len, plan.slots)) == num_experts:
        served, slot = served[:, 0], slot[:, 0]
    return with_none(served, slot, len(plan.slots), device)


def with_none(served: np.ndarray, slot: np.ndarray, devices: int, device: torch.device) -> Serving:
    """Tables [E, P] or [E] with the entries of expert -1."""

    def tensor(table: np.ndarray, end: int) -> Tensor:
        whole = np.concatenate([table, np.full_like(table[:1], end)])
        return torch.from_numpy(whole.astype(np.int64)).to(device)

    return Serving(tensor(served, devices), tensor(slot, -1), devices)

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
    """Who serves what, seen from one device: expert [E, P] -> device, and the expert's index among that device's.

    The tables are [E] where no expert is replicated.
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
    return Serving(torch.from_numpy(served).to(device), torch.from_numpy(slot).to(device), len(plan.slots))

"""Shares of copies decided for the batch (``spec.batch_shares``): the tables of ``ep`` made anew in every layer.

T tokens, K top-k, E experts, R experts with several copies, G devices, P phases.
"""

import numpy as np
import torch
from torch import Tensor

from ...spec.batch_shares import BatchShares
from ...spec.plan import LayerPlan
from ...spec.routing import divided
from ..collectives import all_reduce
from ..groups import Group
from .serving import Serving, place_of, with_none


class ByBatch:
    """The tables of one layer."""

    def __init__(self, plan: LayerPlan, experts: int, device: torch.device, group: Group = None) -> None:
        assert plan.speeds is not None
        self._experts, self._device, self._devices = experts, device, len(plan.slots)
        self._group = group
        self._shares = BatchShares(plan.slots, plan.speeds, experts)
        self._place = place_of(plan, experts)  # [G, E]
        self._served = divided(np.eye(self._devices)[np.argmax(self._place >= 0, axis=0)])  # [E, P] of single copies

    def __call__(self, ids: Tensor) -> Serving:
        """For the experts [T, K] of this device's tokens (-1: none) and all others'; all devices together."""
        load = torch.bincount(ids.flatten() + 1, minlength=self._experts + 1)[1:].contiguous()
        return self.tables(all_reduce(load, self._group).numpy(force=True))

    def tables(self, load: np.ndarray) -> Serving:
        """load: [E] rows of all devices."""
        copied = self._shares.copied
        served = self._served.copy()
        served[copied] = divided(self._shares.weights(load.astype(float)))
        place = self._place[served, np.arange(self._experts)[:, None]]
        return with_none(served, place, self._devices, self._device)

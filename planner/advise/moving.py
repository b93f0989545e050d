"""What moving experts costs: bytes that devices load, and the time of the one that loads most."""

# L layers, G devices

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...spec.placement import PlacementLayer


@dataclass(frozen=True)
class Move:
    """From one placement to another. bytes: loaded by all devices; most: by the device that loads most."""

    bytes: int
    most: int

    def seconds(self, link: float) -> float:
        """Of the device that loads most, over its link of ``link`` bytes per second, while nothing else uses it."""
        return self.most / link


def move(old: Sequence[PlacementLayer], new: Sequence[PlacementLayer], expert_bytes: Sequence[int]) -> Move:
    """expert_bytes: [L] of one expert."""
    loaded = np.zeros(len(new[0].slots), np.int64)
    for was, now, size in zip(old, new, expert_bytes, strict=True):
        loaded += [size * len(set(b) - set(a)) for a, b in zip(was.slots, now.slots, strict=True)]
    return Move(int(loaded.sum()), int(loaded.max()))

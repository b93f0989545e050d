"""Balance: how long the hottest device of a layer takes, over what it would take if all were equally busy.

1 is perfect. A layer (or a window of one) without tokens counts 1: no device waits for another there, and no placement
could do better. It counts like any other in a mean over layers, so that means of different tokens stay comparable.

This is the one meaning of balance, for every score, cap and bound; ``solvers.balance``, which may import nothing,
gives the same of placements as arrays.
"""

# G devices

import numpy as np
from numpy.typing import ArrayLike


def over_ideal(load: ArrayLike, speed: ArrayLike | None = None) -> np.ndarray:
    """[..., G] each device's time over that of all devices equally busy; load: [..., G], speed: [G], by default 1."""
    loads = np.asarray(load, float)
    speeds = np.ones(loads.shape[-1]) if speed is None else np.asarray(speed, float)
    ideal = loads.sum(axis=-1, keepdims=True) / speeds.sum()
    return np.where(ideal > 0, loads / speeds / np.where(ideal > 0, ideal, 1.0), 1.0)


def balance(load: ArrayLike, speed: ArrayLike | None = None) -> np.ndarray:
    """[...] of the hottest device; load: [..., G], speed: [G], by default 1."""
    return over_ideal(load, speed).max(axis=-1)

"""What a placement costs where tokens change devices between layers."""

# L layers, E experts, G devices

import numpy as np
from numpy.typing import ArrayLike


def host_weights(hosts: ArrayLike, device_weight: float = 1.0, host_weight: float = 1.0) -> np.ndarray:
    """[G, G] what a token pays between two devices; hosts: [G] number of each device's host."""
    host = np.asarray(hosts)
    weight = np.where(host[:, None] == host[None, :], float(device_weight), float(host_weight))
    np.fill_diagonal(weight, 0.0)
    return weight


def crossings(device_of: ArrayLike, transitions: ArrayLike, weight: ArrayLike) -> float:
    """Weighted crossings; device_of: [L, E], transitions: [L-1, E, E], weight: [G, G]."""
    placed, counts, weights = np.asarray(device_of), np.asarray(transitions, float), np.asarray(weight, float)
    return float(sum((counts[i] * weights[np.ix_(placed[i], placed[i + 1])]).sum() for i in range(len(counts))))

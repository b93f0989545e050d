"""Small random affinity placements, and their optimum by brute force."""

from itertools import product

import numpy as np

from moeplan.solvers.balance import over_ideal
from moeplan.solvers.placement.crossings import host_weights

WEIGHTS = [(1.0, 1.0), (1.0, 3.0), (0.0, 1.0), (0.3, 1.3)]


def layouts(problem, layer):
    """[N, E] every placement of a layer within slots and limit."""
    devices = np.arange(problem.devices)
    rows = np.array(list(product(devices, repeat=problem.experts)))
    on = rows[:, :, None] == devices
    finish = np.einsum("neg,e->ng", on, problem.load[layer]) / problem.speed
    keeps = (on.sum(axis=1) <= problem.capacity) & (finish <= problem.limit[layer] * (1 + 1e-9))
    return rows[keeps.all(axis=1)]


def brute_force(problem):
    """The least movement, by dynamic programming over the placements of one layer after the other; inf if none."""
    weight = host_weights(problem.hosts, problem.device_weight, problem.host_weight)
    best = before = None
    for layer in range(problem.layers):
        rows = layouts(problem, layer)
        if len(rows) == 0:
            return np.inf
        on = (rows[:, :, None] == np.arange(problem.devices)).reshape(len(rows), -1).astype(float)
        shared = np.kron(np.triu(problem.together[layer], 1), weight)
        cost = np.einsum("ni,ij,nj->n", on, shared, on)
        if before is not None:
            steps = before @ np.kron(problem.transitions[layer - 1], weight) @ on.T
            cost = cost + (best[:, None] + steps).min(axis=0)
        best, before = cost, on
    return best.min()


def capped_brute_force(problem, samples, cap):
    """The least movement, ``together`` ignored, of placements with a mean balance of at most ``cap``; inf if none.

    samples: [S, L, E]. All placements of all layers at once: for few layers only.
    """
    weight = host_weights(problem.hosts, problem.device_weight, problem.host_weight)
    cost, hottest, before = np.zeros(1), np.zeros(1), None
    for layer in range(problem.layers):
        rows = layouts(problem, layer)
        on = (rows[:, :, None] == np.arange(problem.devices)).astype(float)
        finish = np.einsum("se,neg->nsg", over_ideal(samples[:, layer], problem.speed), on) / problem.speed
        flat = on.reshape(len(rows), -1)
        moved = np.zeros((1, len(rows)))
        if before is not None:
            moved = before @ np.kron(problem.transitions[layer - 1], weight) @ flat.T
        before = flat
        # [..., N before, N now]
        cost, hottest = cost[..., None] + moved, hottest[..., None] + finish.max(axis=2).mean(axis=1)
        if layer == 0:
            cost, hottest = cost[0], hottest[0]
    return cost[hottest <= problem.layers * cap * (1 + 1e-9)].min(initial=np.inf)


def random_capacity(rng, experts, devices):
    """Even, or uneven, some devices empty; seldom so much that all experts fit on one."""
    if rng.random() < 0.4:
        return np.full(devices, -(-experts // devices))
    capacity = rng.integers(0, max(experts // 2, 1) + 1, devices)
    while capacity.sum() < experts:
        capacity[rng.integers(devices)] += 1
    return capacity


def random_case(rng, most=100):
    """Arguments of a solver; at most so many placements of a layer, slots ignored."""
    layers, devices = int(rng.choice([1, 2, 2, 3, 4])), int(rng.choice([1, 2, 2, 3, 3, 4]))
    largest = 8 if devices == 1 else min(8, int(np.log(most) / np.log(devices)))
    experts = int(rng.integers(1 if rng.random() < 0.2 else largest // 2, largest + 1))
    capacity = random_capacity(rng, experts, devices)
    transitions = rng.integers(0, 9, (layers - 1, experts, experts))
    transitions[rng.random(transitions.shape) < rng.choice([0.0, 0.4, 0.9])] = 0
    load = np.round(rng.pareto(1.0, (layers, experts)) * 5)
    speed = rng.choice([1.0, 2.0, 0.5], devices)
    capped = rng.random() < 0.5
    limit = load.sum(axis=1) / speed.sum() * rng.choice([1.1, 1.4, 2.0]) + rng.integers(0, 8)
    options = {
        "together": rng.integers(0, 5, (layers, experts, experts)) if rng.random() < 0.4 else None,
        "load": load,
        "speed": speed,
        "limit": limit if capped else None,
    }
    hosts = rng.integers(0, 3, devices)
    return (transitions, capacity, hosts, *WEIGHTS[rng.integers(len(WEIGHTS))]), options

"""Splicing: the best path through the candidates' layers, devices renamed where they are alike."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.solvers.placement.annealing import Affinity
from moeplan.solvers.placement.relabel import Groups
from moeplan.solvers.placement.splice import Costs, splice

HOSTS = np.array([0, 0, 1, 1])
WEIGHTS = (1.0, 2.0)  # between devices of a host, and on top of it between hosts


def costs_of(
    seed: int, layers: int, speed: np.ndarray, slots: np.ndarray, *, samples: int = 2, fixed_hosts: bool = False
) -> Costs:
    rng, experts = np.random.default_rng(seed), int(slots.sum())
    transitions = rng.integers(0, 9, (layers - 1, experts, experts)) * 1.0
    pairs = np.triu(rng.integers(0, 5, (layers, experts, experts)), 1) * 1.0
    load = rng.gamma(1.0, 1.0, (samples, layers, experts))
    groups = Groups.of(slots, speed, HOSTS)
    return Costs(transitions, pairs + pairs.transpose(0, 2, 1), WEIGHTS, load, speed, groups, fixed_hosts)


def placements(seed: int, count: int, layers: int, slots: np.ndarray) -> np.ndarray:
    """[N, L, E] full devices, experts at random."""
    rng, row = np.random.default_rng(seed + 1), np.repeat(np.arange(len(slots)), slots)
    return np.stack([[rng.permutation(row) for _ in range(layers)] for _ in range(count)])


def exact(costs: Costs, placed: np.ndarray) -> float:
    affinity = Affinity.of(costs.transitions, costs.together)
    return affinity.cost(placed, HOSTS, WEIGHTS[0], sum(WEIGHTS))


ALIKE = (np.ones(4), np.full(4, 2))
UNLIKE = (np.array([1.0, 1.0, 0.5, 1.0]), np.array([2, 2, 2, 1]))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([ALIKE, UNLIKE]), st.booleans())
def test_a_splice_beats_all_its_candidates_and_keeps_the_rules(seed, count, devices, fixed):
    speed, slots = devices
    costs, candidates = costs_of(seed, 5, speed, slots, fixed_hosts=fixed), placements(seed, count, 5, slots)
    balances = [costs.hottest(placed).mean() for placed in candidates]
    cap = sorted(balances)[count // 2]
    for limit in (np.inf, cap):
        spliced = splice(costs, candidates, limit)
        assert spliced is not None
        assert all((np.bincount(row, minlength=4) == slots).all() for row in spliced)
        assert costs.hottest(spliced).mean() <= limit + 1e-12
        least = min(exact(costs, c) for c, b in zip(candidates, balances, strict=True) if b <= limit)
        assert costs.total(spliced) == pytest.approx(exact(costs, spliced))
        if limit == np.inf or count == 1:
            assert exact(costs, spliced) <= least + 1e-9
    if fixed:  # every layer's hosts are those of one of the candidates
        spliced = splice(costs, candidates, np.inf)
        for layer, row in enumerate(spliced):
            assert any((HOSTS[row] == HOSTS[c[layer]]).all() for c in candidates)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 5.0))
def test_without_names_to_change_the_path_is_the_best_of_all(seed, price):
    speed, slots = np.array([1.0, 0.5, 0.7, 0.9]), np.full(4, 2)  # nobody is alike
    costs, candidates = costs_of(seed, 4, speed, slots), placements(seed, 3, 4, slots)
    spliced = splice(costs, candidates, np.inf, price)

    def value(placed: np.ndarray) -> float:
        return exact(costs, placed) + price * costs.hottest(placed).sum()

    every = [candidates[list(path), np.arange(4)] for path in itertools.product(range(3), repeat=4)]
    assert value(spliced) == pytest.approx(min(map(value, every)))


def test_good_halves_go_together_although_their_devices_have_other_names():
    layers, slots = 6, np.full(4, 2)
    good = np.tile(np.repeat(np.arange(4), 2), (layers, 1))
    chain = np.tile(np.kron(np.eye(4), np.ones((2, 2))), (layers - 1, 1, 1)) * 10  # experts 2i and 2i + 1 stay together
    costs = costs_of(0, layers, np.ones(4), slots)._replace(transitions=chain, together=np.zeros((layers, 8, 8)))
    first, second = placements(5, 2, layers, slots)
    first[:3] = good[:3]
    second[3:] = np.array([3, 2, 0, 1])[good[3:]]  # hosts and devices change names
    assert min(exact(costs, first), exact(costs, second)) > 0
    spliced = splice(costs, np.stack([first, second]), np.inf)
    assert exact(costs, spliced) == 0
    assert exact(costs, splice(costs._replace(fixed_hosts=True), np.stack([first, second]), np.inf)) > 0


def test_no_path_within_the_cap_is_said():
    costs, candidates = costs_of(3, 4, *ALIKE), placements(3, 3, 4, ALIKE[1])
    coolest = np.min([costs.hottest(placed) for placed in candidates], axis=0).mean()
    assert splice(costs, candidates, coolest - 1e-6) is None
    tight = splice(costs, candidates, coolest + 1e-6)
    assert tight is not None
    assert costs.hottest(tight).mean() == pytest.approx(coolest)

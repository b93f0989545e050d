"""One annealing walk: its tables follow every proposal, its energies are real, whole devices change places safely."""

import math
from dataclasses import replace
from threading import Event

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.solvers.balance import longest_first, over_ideal
from moeplan.solvers.placement.annealing import Affinity
from moeplan.solvers.placement.chain import Chain, Problem
from moeplan.solvers.placement.relabel import Groups, relabel
from moeplan.solvers.placement.tables import FREE, PARTNERS, Rules, fill_flows, fill_near, fill_partners
from moeplan.solvers.placement.walks import Walks


def chain_for(seed: int, *, alike: bool, max_moves: int = -1, fixed_hosts: bool = False) -> tuple[Chain, Affinity]:
    """Four layers of eight experts in eleven slots of five devices, on hosts of two, two and one; not placed well."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 20, (3, 8, 8)) * (rng.random((3, 8, 8)) < 0.4)
    pairs = np.triu(rng.integers(0, 5, (4, 8, 8)), 1).astype(float)
    affinity = Affinity.of(counts, pairs + pairs.transpose(0, 2, 1))
    slots = np.array([2, 2, 2, 2, 3])
    speed = np.ones(5) if alike else rng.uniform(0.5, 2.0, 5)
    load = rng.gamma(1.0, 1.0, (3, 4, 8))
    start = longest_first(load.sum(axis=0), speed, slots)
    problem = Problem(
        *affinity.between(),
        load=load,
        slots=slots,
        speed=speed,
        host=np.array([0, 1, 0, 1, 2]),
        weights=(0.3, 1.0),
        cap=100.0,
        price=0.0,
        previous=start.copy(),
        max_moves=max_moves,
        fixed_hosts=fixed_hosts,
    )
    return Chain(problem, start.copy(), seed), affinity


def cost(affinity: Affinity, chain: Chain) -> float:
    return affinity.cost(chain.placed, chain.problem.host, 0.3, 1.3)


def check_tables(chain: Chain) -> None:
    p = chain.problem
    near, near_host = np.zeros_like(chain.tables.near), np.zeros_like(chain.tables.near_host)
    every = np.ones(len(near), bool)
    fill_near(p.between, chain.placed, near, every)
    fill_near(p.between, p.host[chain.placed], near_host, every)
    assert np.array_equal(near, chain.tables.near)
    assert np.array_equal(near_host, chain.tables.near_host)
    for placed, held, slot in zip(chain.placed, chain.tables.slots, chain.tables.slot_of, strict=True):
        assert np.array_equal(chain.tables.device_of_slot[slot], placed)
        assert np.array_equal(held[slot], np.arange(8))
        assert (held == FREE).sum() == len(held) - 8


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([-1, 0, 5]), st.booleans())
def test_tables_and_energies_follow_every_proposal(seed, hot, max_moves, fixed):
    chain, affinity = chain_for(seed, alike=False, max_moves=max_moves, fixed_hosts=fixed)
    p, before, hosts = chain.problem, cost(affinity, chain), chain.problem.host[chain.placed]
    warm = 100.0 if hot else 5.0
    gained = chain._walk(warm, warm / 10, limit=1e9, hard=False, steps=500)
    assert cost(affinity, chain) - before == pytest.approx(gained, abs=1e-3)
    check_tables(chain)
    moved = (chain.placed != p.previous).sum()
    if max_moves >= 0:
        assert chain.moved == moved <= max_moves
    if fixed:
        assert np.array_equal(p.host[chain.placed], hosts)
    elif hot and max_moves < 0:
        assert moved > 0
    finish = chain.tables.finish.copy()
    chain.balance()  # fills it again
    assert np.allclose(finish, chain.tables.finish, atol=1e-4)


def test_the_cap_is_a_rule_where_it_is_hard():
    chain, _ = chain_for(3, alike=False)
    chain.price = 0.0
    limit = chain.balance() * 4
    chain._walk(100.0, 10.0, limit=limit, hard=True, steps=5_000)
    assert chain.balance() * 4 <= limit * (1 + 1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_whole_devices_change_places_without_changing_balance(seed, alike, fixed):
    chain, affinity = chain_for(seed, alike=alike, fixed_hosts=fixed)
    before, balance, was = cost(affinity, chain), chain.balance(), chain.placed.copy()
    hosts = chain.problem.host[was]
    gained = sum(chain._relabel(1e6) for _ in range(3))
    assert cost(affinity, chain) - before == pytest.approx(gained, abs=1e-3)
    assert chain.balance() == pytest.approx(balance)
    check_tables(chain)
    for old, new in zip(was, chain.placed, strict=True):
        for device in range(5):
            assert len(set(new[old == device])) <= 1  # a group stays together
    if not alike:
        assert np.array_equal(chain.placed, was)
    if fixed:
        assert np.array_equal(chain.problem.host[chain.placed], hosts)
    assert (chain.placed == 4).sum() == (was == 4).sum()  # the device of three slots is like no other


def test_two_halves_with_crossed_names_are_mended():
    """The first two layers agree, and the last two, but those have the devices exchanged."""
    between = np.zeros((4, 3, 8, 8), np.float32)
    for layer in range(3):
        between[layer, 2] = np.eye(8) * 10
        between[layer + 1, 0] = np.eye(8) * 10
    pairs = np.arange(8) // 2
    placed = np.stack([pairs, pairs, pairs[::-1], pairs[::-1]])
    host = np.array([0, 0, 1, 1])
    flows, label = np.zeros((3, 4, 4)), np.tile(np.arange(4), (4, 1))
    fill_flows(between, placed, flows)
    assert flows[1].diagonal().sum() == 0
    groups = Groups.of(np.full(4, 2), np.ones(4), host)
    assert groups.members.tolist() == [[0, 1], [2, 3]]
    state = np.array([88172645463325252], np.uint64)
    rules = Rules(1.0, 1.0, price=0.0, cap=math.inf, hard=False, max_moves=-1, fixed_hosts=False)
    gained = relabel(flows, label, groups, rules, 1e-9, 4000, state)
    assert gained == -(80 + 80)  # between devices, and hosts
    assert len(np.unique(np.take_along_axis(label, placed, axis=1), axis=0)) == 1


def test_partners_are_drawn_in_proportion_to_traffic():
    between = np.zeros((2, 3, 4, 4), np.float32)
    between[0, 2, 1] = [30, 0, 10, 0]
    between[0, 1, 1, 3] = 24
    partners = np.zeros((2, 4, PARTNERS), np.int32)
    fill_partners(between, partners)
    kinds, times = np.unique(partners[0, 1], return_counts=True)
    assert dict(zip(kinds.tolist(), times.tolist(), strict=True)) == {1 * 4 + 3: 24, 2 * 4: 30, 2 * 4 + 2: 10}
    assert (partners[1] == -1).all()


@pytest.mark.parametrize(("stall", "squeezed"), [(0.04, False), (0.9, True)])
def test_a_wait_in_the_first_moments_is_not_taken_for_slow_steps(monkeypatch, stall, squeezed):
    """Steps take nothing but for a wait after the first epoch, of a second that is enough for all of them."""
    chain, _ = chain_for(0, alike=True)
    clock = iter([0.0] * 3 + [stall] * 200)
    monkeypatch.setattr("moeplan.solvers.placement.chain.time.perf_counter", lambda: next(clock))
    chain.run(20_000, 1.0, 1, Event(), None)
    assert chain.squeezed == squeezed
    assert (chain.done == 20_000) == (not squeezed)


def test_a_search_with_time_to_spare_does_all_its_steps(monkeypatch):
    """Before speed is judged an epoch has few steps; a twentieth of much time is more than the whole search takes."""
    monkeypatch.setattr("moeplan.solvers.placement.chain.UNTIMED", 100)
    clock = iter(0.01 * i for i in range(1000))
    monkeypatch.setattr("moeplan.solvers.placement.chain.time.perf_counter", lambda: next(clock))
    chain, _ = chain_for(0, alike=True)
    chain.run(200_000, 1e6, 1, Event(), None)
    assert not chain.squeezed
    assert chain.done == 200_000


def test_a_held_price_is_followed_once_the_walk_is_cold():
    chain, _ = chain_for(1, alike=True)
    cap = chain.balance() * 0.5  # out of reach: the price only rises
    chain.problem = replace(chain.problem, cap=cap)
    chain.price, prices = 7.0, []
    chain.run(20_000, math.inf, 1, Event(), lambda _: prices.append(chain.price), hold=True)
    epochs = len(prices)
    assert prices[: int(0.6 * epochs)] == [7.0] * int(0.6 * epochs)
    assert prices == sorted(prices)
    assert prices[-1] > 7.0


@pytest.mark.parametrize("cap", [1.08, 1.15])
def test_scouts_find_what_the_cap_costs_in_the_end(cap):
    """Of one problem the price of short walks is near that of a long one."""
    rng = np.random.default_rng(5)
    affinity, load = Affinity.of(rng.gamma(0.3, 100.0, (5, 16, 16))), rng.gamma(2.0, 1.0, (1, 6, 16))
    problem = Problem(
        *affinity.between(),
        load=over_ideal(load, np.ones(4)),
        slots=np.full(4, 4),
        speed=np.ones(4),
        host=np.array([0, 0, 1, 1]),
        weights=(0.3, 1.0),
        cap=cap,
        price=0.0,
        previous=(start := longest_first(load[0], np.ones(4), np.full(4, 4))),
        max_moves=-1,
        fixed_hosts=False,
    )
    walks = Walks(problem, 300_000, math.inf, (2, 0, 0), 0, Event(), None)
    walks.scout(start)
    long = Chain(problem, start.copy(), 99)
    long.run(300_000, math.inf, 1, Event(), None)
    assert 1 / 3 < walks.price / long.settled < 3

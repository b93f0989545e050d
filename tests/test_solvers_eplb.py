import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.solvers import Infeasible
from moeplan.solvers.replication.eplb import eplb
from moeplan.solvers.slots import EMPTY, Slots

README = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)


def test_reproduces_the_published_example_in_both_modes():
    equal = np.ones(8)
    assert eplb(README, 16, 4, 2, 8).hottest(README, equal).tolist() == [156, 179.5]
    assert eplb(README, 16, 1, 1, 8).hottest(README, equal).tolist() == [138.5, 172]
    hierarchical = eplb(README, 16, 4, 2, 8)
    assert hierarchical.copies.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
    for row in hierarchical.expert_of:
        halves = [{e // 3 for e in half} for half in np.split(row, 2)]
        assert [len(groups) for groups in halves] == [2, 2]
        assert not halves[0] & halves[1]


def test_groups_that_the_hosts_do_not_divide_mean_global():
    assert (eplb(README, 16, 3, 2, 8).expert_of == eplb(README, 16, 1, 1, 8).expert_of).all()


def test_copies_on_one_device_are_put_together_and_carry_the_same():
    placed = eplb([[100, 1]], 6, 1, 1, 2)  # five copies of expert 0 on two devices
    assert placed.copies.tolist() == [[2, 1]]
    assert (placed.expert_of == EMPTY).sum() == 3
    assert sorted(placed.finish([[100, 1]], np.ones(2))[0].tolist()) == pytest.approx([41, 60])


@pytest.mark.parametrize(
    ("slots", "groups", "hosts", "devices", "reason"),
    [
        (15, 1, 1, 8, "slots % devices == 0: got 15 slots and 8 devices"),
        (16, 8, 2, 8, "experts % groups == 0: got 12 experts and 8 groups"),
        (18, 3, 3, 2, "devices % hosts == 0: got 2 devices and 3 hosts"),
        (8, 1, 1, 8, "slots >= experts: 12 experts in 8 slots"),
    ],
)
def test_indivisible_counts_name_the_rule(slots, groups, hosts, devices, reason):
    with pytest.raises(Infeasible, match=reason):
        eplb(README, slots, groups, hosts, devices)


@pytest.mark.parametrize("load", [[1.0, 2.0], [[]], [[1.0, -1.0]], [[1.0, np.nan]]])
def test_malformed_loads_are_refused(load):
    with pytest.raises(ValueError, match="finite, non-negative"):
        eplb(load, 4, 1, 1, 2)


@given(st.data())
@settings(max_examples=40)
def test_every_placement_is_valid_and_keeps_groups_on_one_host(data):
    hosts = data.draw(st.sampled_from([1, 2, 3]))
    groups = hosts * data.draw(st.integers(1, 2))
    devices = hosts * data.draw(st.integers(1, 3))
    experts = groups * data.draw(st.integers(1, 4))
    slots = devices * (-(-experts // devices) + data.draw(st.integers(0, 2)))
    load = np.random.default_rng(data.draw(st.integers(0, 999))).integers(0, 50, (2, experts))
    placed = eplb(load, slots, groups, hosts, devices)  # ``Slots`` validates
    assert placed.num_experts == experts
    np.testing.assert_allclose(placed.finish(load, np.ones(devices)).sum(axis=1), load.sum(axis=1))
    host = placed.device_of_slot // (devices // hosts)
    for row in placed.expert_of:
        held = row != EMPTY
        pairs = {(e // (experts // groups), h) for e, h in zip(row[held].tolist(), host[held].tolist(), strict=True)}
        assert len(pairs) == groups


def test_slots_round_trip_through_lists():
    placed = eplb(README, 16, 1, 1, 8)
    lists = placed.to_lists()
    again = Slots.from_lists([held for held, _ in lists], [share for _, share in lists], placed.capacity)
    np.testing.assert_allclose(again.finish(README, np.ones(8)), placed.finish(README, np.ones(8)))
    assert again.to_lists() == lists


def test_slots_from_single_copies():
    placed = Slots.from_device_of([[1, 0, 1], [0, 0, 1]], [2, 3])
    assert placed.to_lists()[0][0] == [[1], [0, 2]]
    assert placed.finish([[1, 2, 4], [1, 2, 4]], [1, 2]).tolist() == [[2, 2.5], [3, 2]]
    with pytest.raises(ValueError, match="layer 0: device 1"):
        Slots.from_device_of([[1, 1, 1]], [2, 2])
    with pytest.raises(ValueError, match="device 2"):
        Slots.from_device_of([[0, 2]], [2, 2])


@pytest.mark.parametrize(
    ("expert_of", "share_of", "reason"),
    [
        ([[0, 0, 1, EMPTY]], [[0.5, 0.5, 1, 0]], "layer 0: device 0 holds expert 0 twice"),
        ([[0, 2, 0, EMPTY]], [[0.5, 1, 0.5, 0]], "layer 0: expert 1 has no copy"),
        ([[0, 1, 0, EMPTY]], [[0.5, 1, 0.4, 0]], "shares of expert 0 sum to 0.9"),
        ([[0, 1, 0, EMPTY]], [[0.5, 1, 0.5, 0.1]], "empty slot has a share"),
        ([[0, 1, 0, EMPTY]], [[1.5, 1, -0.5, 0]], "at least 0"),
        ([[0, 1, 0]], [[1, 1, 1]], "4 slots"),
        ([[0, 1, -2, EMPTY]], [[1, 1, 0, 0]], "-1 for empty"),
    ],
)
def test_slots_refuse_what_breaks_a_rule(expert_of, share_of, reason):
    with pytest.raises(ValueError, match=reason):
        Slots(expert_of, share_of, [2, 2])

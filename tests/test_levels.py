"""Two levels of an exchange: relays and groups for hosts of any size, and the rows that planner and runtime count."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.choices import Choices, Forward
from moeplan.planner.layout import Layout as PlannedLayout
from moeplan.runtime.layout import Layout
from moeplan.runtime.strategies import ep, hierarchical
from moeplan.runtime.strategies.rows import fields
from moeplan.spec.layout import even
from moeplan.spec.levels import across_groups, host_numbers, inside_groups, relays, two_levels
from moeplan.spec.plan import LayerPlan
from moeplan.spec.workload import Workload

EXPERTS, TOP_K, HIDDEN = 8, 3, 4
CPU = torch.device("cpu")
hosts_of = st.lists(st.sampled_from("abc"), min_size=1, max_size=7)


@given(hosts_of)
def test_relays_stand_on_the_host_and_groups_hold_all_who_pass_rows_on(hosts):
    table, across, inside = relays(hosts), across_groups(hosts), inside_groups(hosts)
    number = host_numbers(hosts)
    for groups in (across, inside):
        assert sorted(device for group in groups for device in group) == list(range(len(hosts)))
        assert all(list(group) == sorted(group) for group in groups)
    assert {tuple(sorted(group)) for group in inside} == {
        tuple(d for d, name in enumerate(hosts) if name == host) for host in hosts
    }
    group_of = {device: group for group in across for device in group}
    for device, row in enumerate(table):
        assert number[row].tolist() == list(range(number.max() + 1))
        assert row[number[device]] == device  # nobody relays at home
        assert all(group_of[int(relay)] is group_of[device] for relay in row)
    # Every relay of a host serves as many devices of another as any, but one.
    for host in range(number.max() + 1):
        served = [
            np.sum(table[number == other, host] == d)
            for other in {*number} - {host}
            for d in np.flatnonzero(number == host)
        ]
        assert not served or len(set(hosts)) > 2 or max(served) - min(served) <= 1


@given(st.integers(1, 4), st.integers(1, 4))
def test_hosts_of_one_size_exchange_by_local_index(count, size):
    hosts = [host for host in range(count) for _ in range(size)]
    assert across_groups(hosts) == tuple(tuple(range(i, count * size, size)) for i in range(size))
    assert two_levels(hosts) == (count > 1 and size > 1)


def test_unequal_hosts():
    assert relays("aaabb").tolist() == [[0, 3], [1, 4], [2, 3], [0, 3], [1, 4]]
    assert across_groups("aaabb") == ((0, 2, 3), (1, 4))
    assert across_groups("aaab") == ((0, 1, 2, 3),)
    assert across_groups("abba") == ((0, 1), (2, 3))
    assert two_levels("aab")
    assert not two_levels("aa")
    assert not two_levels("ab")


@st.composite
def placed(draw):
    """Hosts, slots (with copies and idle devices), tokens of each device, a seed, whether there are shares, and the
    number of identity experts."""
    hosts = draw(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=6))
    devices = len(hosts)
    holders = [draw(st.sets(st.integers(0, devices - 1), min_size=1, max_size=3)) for _ in range(EXPERTS)]
    slots = tuple(tuple(e for e in range(EXPERTS) if g in holders[e]) for g in range(devices))
    tokens = tuple(draw(st.lists(st.integers(0, 20), min_size=devices, max_size=devices)))
    identity = draw(st.sampled_from([0, 0, 4, 100]))
    return host_numbers(hosts).tolist(), slots, tokens, draw(st.integers(0, 2**30)), draw(st.booleans()), identity


@settings(max_examples=60, deadline=None)
@given(placed(), st.sampled_from([1, 1, 2, 5]))
def test_what_both_levels_send_is_what_the_planner_counts(case, chunks):
    """Every row of the runtime, played through by hand: across, from relays inside, and to the experts, in chunks."""
    hosts, slots, tokens, seed, shared, identity = case
    devices, rng = len(hosts), np.random.default_rng(seed)
    shares = None
    if shared:
        held = np.array([[e in experts for e in range(EXPERTS)] for experts in slots])
        taken = rng.uniform(0.01, 1.0, held.shape) * held
        taken /= taken.sum(0)
        shares = tuple(tuple(float(taken[g, e]) for e in experts) for g, experts in enumerate(slots))
    plan = LayerPlan(strategy="hierarchical", slots=slots, shares=shares)
    ids = rng.random((sum(tokens), EXPERTS + identity)).argsort(1)[:, :TOP_K]
    ids = np.where(ids < EXPERTS, ids, -1)
    workload = Workload(phase="prefill", tokens=max(sum(tokens), 1), sequences=max(sum(tokens), 1))
    choices = Choices(ids[None], PlannedLayout(workload, 1, tokens, tokens), np.array(hosts), EXPERTS)
    for c, part in enumerate(choices.chunks(chunks) if chunks > 1 else [choices]):
        own = [Layout(rank, 1, tokens, tokens, 1).own for rank in range(devices)]
        first = [own[rank].start + sum(even(count, chunks)[:c]) for rank, count in enumerate(tokens)]
        mine = [ids[at : at + even(count, chunks)[c]] for at, count in zip(first, tokens, strict=True)]
        check_rows(plan, hosts, mine, first, part.forward([plan]))


def check_rows(plan: LayerPlan, hosts: list[int], ids: list[np.ndarray], first: list[int], planned: Forward) -> None:
    """ids: of each device's tokens [T, K], the first of which have these numbers."""
    devices, slots = len(hosts), plan.slots
    ways = [hierarchical.way(plan, hosts, EXPERTS, rank, CPU) for rank in range(devices)]
    inside, number = inside_groups(hosts), host_numbers(hosts)

    arriving = [[] for _ in range(devices)]  # (source, rows) at each relay
    told = np.zeros((devices, devices, 2), int)
    for rank, to in enumerate(ways):
        mine, x = torch.from_numpy(ids[rank]), torch.ones(len(ids[rank]), HIDDEN)
        phase = ep.phases(first[rank], len(mine), CPU)
        rows, _, counts = hierarchical.pack(x, mine, torch.ones(mine.shape), to, phase)
        told[rank] = counts.numpy()
        sent = counts[to.across, 0].tolist()
        assert sum(sent) == len(rows) == counts[:, 0].sum()
        for relay, part in zip(to.across.tolist(), rows.split(sent), strict=True):
            arriving[relay].append((rank, part))
    across = planned.across.sizes(0) + np.diag(planned.across_kept[0])
    assert (told[:, :, 0] == across).all()

    passed, computed = np.zeros((devices, devices), int), np.zeros((devices, EXPERTS), int)
    for relay, to in enumerate(ways):
        rows = torch.cat([part for _, part in arriving[relay]])
        copies, _, counts = hierarchical.relay(rows, HIDDEN, torch.float32, TOP_K, to)
        members = inside[number[relay]]
        passed[relay, list(members)] = counts.numpy()
        for device, part in zip(members, copies.split(counts.tolist()), strict=True):
            here = fields(part, HIDDEN, torch.float32, TOP_K)[1]
            assert ((here >= 0).any(1)).all()
            np.add.at(computed[device], np.array(slots[device], int)[here[here >= 0].numpy()], 1)
    assert (passed == planned.inside.sizes(0) + np.diag(planned.inside_kept[0])).all()
    assert (computed == planned.experts.devices[0]).all()
    assert (planned.arrived[0] == across.sum(0)).all()
    assert (planned.computed[0] == passed.sum(0)).all()
    # What each device is told beforehand is what comes.
    for device, to in enumerate(ways):
        foretold = np.bincount(to.through.numpy(), told[:, device, 1], to.local_devices)
        assert (foretold == passed[list(inside[number[device]]), device]).all()


def test_a_token_crosses_once_however_many_devices_of_a_host_it_needs():
    """Two hosts of two devices, all experts everywhere but on device 0: every token goes over once, then to both."""
    plan = LayerPlan(strategy="hierarchical", slots=((0,), (1,), (2, 3, 4), (5, 6, 7)))
    ids = np.tile([2, 5, 7], (10, 1))
    layout = PlannedLayout(Workload.from_text("prefill:10@1"), 1, (10, 0, 0, 0), (10, 0, 0, 0))
    choices = Choices(ids[None], layout, np.array([0, 0, 1, 1]), EXPERTS)
    forward = choices.forward([plan])
    assert forward.across.sizes(0).tolist() == [[0, 0, 10, 0], [0] * 4, [0] * 4, [0] * 4]
    assert forward.inside.sizes(0)[2].tolist() == [0, 0, 0, 10]
    assert forward.inside_kept[0].tolist() == [0, 0, 10, 0]
    plain = choices.dispatch([plan.model_copy(update={"strategy": "ep"})])
    assert plain.rows.sizes(0)[0].tolist() == [0, 0, 10, 10]

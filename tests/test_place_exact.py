"""Small placements against brute force, value and gap, through the function under the command and the command itself.

What is minimised is computed here anew, from the document alone: loads, windows and fan-out are counted from the trace;
only the smoothed traffic and the load samples, which are input to the problem, are the product's.
"""

import json
import sys
from dataclasses import replace
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from scipy.optimize import linprog

from moeplan.planner.place.fleet import even_fleet
from moeplan.planner.place.interpolation import interpolated
from moeplan.planner.place.request import Request
from moeplan.planner.place.sample import load_samples
from moeplan.planner.place.solve import place
from moeplan.service import cli
from moeplan.solvers.balance import balance_bound, mean_balance
from moeplan.solvers.result import Infeasible
from moeplan.spec.balance import balance, over_ideal
from moeplan.spec.errors import InfeasibleError
from moeplan.spec.placement import Placement, PlacementDevice
from moeplan.spec.trace import Trace

CLOSE = 1e-6  # relative: what HiGHS may take for equal


def subsets(devices):
    return [s for n in range(1, devices + 1) for s in combinations(range(devices), n)]


def held(placement):
    """[L][E] the set of devices of every expert."""
    return [
        [tuple(g for g, on in enumerate(layer.slots) if e in on) for e in range(placement.num_experts)]
        for layer in placement.layers
    ]


def keeps_rules(chosen, fleet, groups, full):
    """Slots, groups and full slots of one layer; chosen: [E] sets of devices."""
    count = [sum(g in s for s in chosen) for g in range(len(fleet))]
    if any(c > d.capacity for c, d in zip(count, fleet, strict=True)):
        return False
    reach = len(chosen) // (1 if groups == 1 else len({d.host for d in fleet}))  # experts that a device may hold
    if full and any(c != min(d.capacity, reach) for c, d in zip(count, fleet, strict=True)):
        return False
    if groups == 1:
        return True
    names, size = sorted({d.host for d in fleet}), len(chosen) // groups
    host = [{fleet[g].host for s in chosen[k * size : (k + 1) * size] for g in s} for k in range(groups)]
    return all(len(h) == 1 for h in host) and all(host.count({n}) == groups // len(names) for n in names)


def hottest(chosen, load, speed, shares):
    """Hottest load over speed of one layer and window."""
    if shares == "even":
        finish = [sum(x / len(s) for s, x in zip(chosen, load, strict=True) if g in s) for g in range(len(speed))]
        return max(f / v for f, v in zip(finish, speed, strict=True))
    # Optimal shares: some set of devices must take all of the experts that are nowhere else.
    return max(
        sum(x for s, x in zip(chosen, load, strict=True) if set(s) <= set(some)) / sum(speed[g] for g in some)
        for some in subsets(len(speed))
    )


def mean_over_ideal(chosen, windows, speed, shares):
    """Mean over windows [W, E] of one layer; a window without load counts 1."""
    ideal = [w.sum() / sum(speed) for w in windows]
    return np.mean([hottest(chosen, w, speed, shares) / i if i else 1.0 for w, i in zip(windows, ideal, strict=True)])


def layouts(experts, fleet, groups, full, copies):
    choices = subsets(len(fleet)) if copies else [(g,) for g in range(len(fleet))]
    return [c for c in product(choices, repeat=experts) if keeps_rules(c, fleet, groups, full)]


def check_balance(placement, windows, request):
    """Value, rules and gap of a placement for balance; windows: [W, L, E]."""
    speed = [d.speed for d in request.devices]
    experts = windows.shape[2]
    rows = layouts(experts, request.devices, request.groups, request.equal_slots, request.slots > experts)
    best = np.mean(
        [min(mean_over_ideal(c, w, speed, request.shares) for c in rows) for w in windows.transpose(1, 0, 2)]
    )
    mine = held(placement)
    assert all(keeps_rules(c, request.devices, request.groups, request.equal_slots) for c in mine)
    value = 0.0
    for layer, w in zip(placement.layers, windows.transpose(1, 0, 2), strict=True):
        loads = w @ layer.share_matrix(experts) / speed
        ideal = w.sum(axis=1) / sum(speed)
        value += np.mean([f.max() / i if i else 1.0 for f, i in zip(loads, ideal, strict=True)])
    solver = placement.solver
    assert solver.objective == pytest.approx(value / len(placement.layers), rel=1e-9)
    assert solver.objective == pytest.approx(best, rel=CLOSE)
    assert solver.bound <= best * (1 + CLOSE)
    assert solver.gap == 0
    assert solver.status == "optimal"


def unequal(rng, devices, hosts, slots):
    fleet = even_fleet(devices, hosts, slots, False)
    if rng.random() < 0.5:
        return fleet
    return tuple(PlacementDevice(host=d.host, speed=float(rng.choice([1, 2, 0.7])), capacity=d.capacity) for d in fleet)


@pytest.mark.parametrize("shares", ["even", "optimal"])
@pytest.mark.parametrize("part", range(4))
def test_copies_of_counts_agree_with_brute_force(shares, part):
    for seed in range(15 * part, 15 * part + 15):
        rng = np.random.default_rng(seed)
        devices, layers = int(rng.integers(2, 4)), int(rng.integers(1, 4))
        experts = int(rng.integers(devices, 6))
        hosts, groups = 1, 1
        if rng.random() < 0.4:
            devices, hosts, groups, experts = 2, 2, 2, int(rng.choice([4, 6]))
        slots = experts + int(rng.integers(0, 4)) * (rng.random() < 0.8)
        full = slots % devices == 0 and rng.random() < 0.5
        counts = np.round(rng.pareto(1.0, (layers, experts)) * 5) * (rng.random((layers, experts)) < 0.8)
        counts[rng.random(layers) < 0.15] = 0
        fleet = even_fleet(devices, hosts, slots, full) if full else unequal(rng, devices, hosts, slots)
        request = Request(fleet, slots, shares=shares, equal_slots=full, groups=groups, objective="balance")
        check_balance(place(Trace.of_counts(counts), request), counts[None], request)


def random_ids(rng, tokens, layers, experts, top_k):
    """[T, L, K] skewed and with affinity: the layers' order of experts is shared by the tokens of a topic."""
    taste = rng.normal(size=(3, layers, experts)) * 1.5
    gumbel = rng.gumbel(size=(tokens, layers, experts)) + taste[rng.integers(0, 3, tokens)]
    return np.argsort(-gumbel, axis=2)[:, :, :top_k]


def windows_of(ids, experts, count=16):
    """[W, L, E]"""
    parts = [p for p in np.array_split(ids, count) if len(p)]
    return np.stack([[np.bincount(p[:, i].ravel(), minlength=experts) for i in range(ids.shape[1])] for p in parts])


@pytest.mark.parametrize("spare", [0, 2])
def test_windows_of_tokens_agree_with_brute_force(spare):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        experts, layers = int(rng.integers(3, 5)), int(rng.integers(1, 3))
        ids = random_ids(rng, int(rng.integers(20, 70)), layers, experts, 2)
        fleet = unequal(rng, 2, 1, experts + spare)
        request = Request(fleet, experts + spare, objective="balance")
        check_balance(place(Trace.of(ids, experts), request), windows_of(ids, experts), request)


def test_windows_with_optimal_shares_agree_with_linear_programs():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        ids = random_ids(rng, 40, 1, 3, 2)
        request = Request(even_fleet(2, 1, 4, False), 4, objective="balance", shares="optimal")
        found, windows = place(Trace.of(ids, 3), request), windows_of(ids, 3)[:, 0]
        ideal, best = windows.sum(axis=1) / 2, np.inf
        for chosen in layouts(3, request.devices, 1, False, True):
            pairs = [(e, g) for e, s in enumerate(chosen) for g in s]
            rows = np.zeros((len(windows), 2, len(pairs) + len(windows)))
            for i, (e, g) in enumerate(pairs):
                rows[:, g, i] = windows[:, e] / ideal
            for w in range(len(windows)):
                rows[w, :, len(pairs) + w] = -1
            whole = np.array([[float(p[0] == e) for p in pairs] + [0.0] * len(windows) for e in range(3)])
            cost = np.array([0.0] * len(pairs) + [1 / len(windows)] * len(windows))
            flat = rows.reshape(-1, rows.shape[2])
            result = linprog(cost, A_ub=flat, b_ub=np.zeros(len(flat)), A_eq=whole, b_eq=np.ones(3))
            best = min(best, result.fun)
        assert found.solver.objective == pytest.approx(best, rel=CLOSE)
        assert found.solver.gap == 0


def moved(chosen, trace, movement, fleet):
    """What a placement of single copies [L][E] moves: crossings of the expected traffic, or fan-out of the tokens."""
    device = np.array(chosen)[:, :, 0]
    names = [d.host for d in fleet]
    host = np.array([names.index(n) for n in names])[device]
    if movement == "coherent" and trace.layers > 1:
        traffic = interpolated(trace) / (trace.layers - 1)
        return sum(
            w * float((t * (a[:, None] != b[None, :])).sum())
            for w, at in ((0.3, device), (1.0, host))
            for t, (a, b) in zip(traffic, pairwise(at), strict=True)
        )
    total = 0.0
    for token in trace.expert_ids:
        for i, experts in enumerate(token):
            total += 0.3 * len(set(device[i][experts])) + 1.0 * len(set(host[i][experts]))
    return total / (trace.tokens * trace.layers)


def heat(chosen, samples, speed):
    """Mean balance over samples [S, L, E]."""
    return np.mean(
        [mean_over_ideal(c, w, speed, "even") for c, w in zip(chosen, samples.transpose(1, 0, 2), strict=True)]
    )


def brute_force(trace, request, samples, cap):
    """The least movement of placements whose mean balance is at most ``cap``; inf where there are none."""
    speed = [d.speed for d in request.devices]
    rows = layouts(trace.num_experts, request.devices, request.groups, False, False)
    heats = [[mean_over_ideal(c, w, speed, "even") for c in rows] for w in samples.transpose(1, 0, 2)]
    found = np.inf
    coherent = request.movement == "coherent" and trace.layers > 1
    if coherent:
        traffic = interpolated(trace) / (trace.layers - 1)
        names = [d.host for d in request.devices]
        at = np.array(rows)[:, :, 0]
        host = np.array([names.index(n) for n in names])[at]
        apart = sum(w * (x[:, None, :, None] != x[None, :, None, :]) for w, x in ((0.3, at), (1.0, host)))
        steps = [np.einsum("nmef,ef->nm", apart, t) for t in traffic]
    else:
        one = [Trace.of(trace.expert_ids[:, i : i + 1], trace.num_experts) for i in range(trace.layers)]
        inside = [[moved([c], t, "ep", request.devices) / trace.layers for c in rows] for t in one]
    for path in product(range(len(rows)), repeat=trace.layers):
        if np.mean([heats[i][n] for i, n in enumerate(path)]) > cap * (1 + 1e-9):
            continue
        if coherent:
            cost = sum(step[a, b] for step, (a, b) in zip(steps, pairwise(path), strict=True))
        else:
            cost = sum(inside[i][n] for i, n in enumerate(path))
        found = min(found, cost)
    return found


SHAPES = [
    (4, 2, 1, 1, 3),
    (4, 2, 2, 2, 3),
    (5, 2, 2, 1, 2),
    (4, 4, 2, 1, 2),
    (4, 4, 2, 2, 2),
    (5, 3, 1, 1, 2),
    (6, 2, 1, 1, 2),
]


def random_single(seed, movement):
    """(trace, request) without a cap; experts, devices, hosts, groups, layers as in SHAPES."""
    rng = np.random.default_rng(seed)
    experts, devices, hosts, groups, layers = SHAPES[seed % len(SHAPES)]
    layers = int(rng.integers(1, layers + 1)) if movement == "ep" else layers
    trace = Trace.of(random_ids(rng, int(rng.integers(20, 60)), layers, experts, int(rng.integers(1, 4))), experts)
    fleet = unequal(rng, devices, hosts, experts)
    return trace, Request(fleet, experts, objective="locality", movement=movement, groups=groups)


def check_movement(placement, trace, request, samples, cap):
    mine, solver = held(placement), placement.solver
    assert all(keeps_rules(c, request.devices, request.groups, False) for c in mine)
    assert heat(mine, samples, [d.speed for d in request.devices]) <= cap * (1 + 1e-9)
    best = brute_force(trace, request, samples, cap)
    assert solver.objective == pytest.approx(moved(mine, trace, request.movement, request.devices), rel=1e-9, abs=1e-12)
    assert solver.objective == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert solver.bound <= best + 1e-9
    assert (solver.gap, solver.status) == (0, "optimal")


@pytest.mark.parametrize("movement", ["coherent", "ep"])
@pytest.mark.parametrize("part", range(3))
def test_movement_without_a_cap_agrees_with_brute_force(movement, part):
    for seed in range(14 * part, 14 * part + 14):
        trace, request = random_single(seed, movement)
        check_movement(place(trace, request), trace, request, trace.expert_counts[None], np.inf)


@pytest.mark.parametrize("movement", ["coherent", "ep"])
@pytest.mark.parametrize("part", range(2))
def test_movement_under_a_cap_agrees_with_brute_force(movement, part):
    refused = 0
    for seed in range(14 * part, 14 * part + 14):
        trace, request = random_single(seed, movement)
        counts = trace.expert_counts[None]
        cap = 1 + float(np.random.default_rng(seed).choice([0.02, 0.1, 0.3, 0.6]))
        request = replace(request, balance_cap=cap)
        if brute_force(trace, request, counts, cap) == np.inf:
            with pytest.raises(InfeasibleError, match="it is proven to be at least"):
                place(trace, request)
            refused += 1
        else:
            check_movement(place(trace, request), trace, request, counts, cap)
    assert 0 < refused < 14


@pytest.mark.parametrize("movement", ["coherent", "ep"])
def test_the_default_cap_is_kept_and_its_optimum_found(movement):
    for seed in range(3):
        trace, request = random_single(seed, movement)
        request = replace(request, objective="latency")
        found = place(trace, request)
        assert found.balance_cap is not None
        check_movement(found, trace, request, load_samples(trace), found.balance_cap)


def test_locality_with_copies_on_hosts_knows_the_best_balance():
    """Copies on several hosts trade balance for locality: the gap is to the coolest placement there is."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        ids = random_ids(rng, 50, 2, 4, 2)
        request = Request(even_fleet(2, 2, 6, False), 6)
        found, windows = place(Trace.of(ids, 4), request), windows_of(ids, 4)
        rows = layouts(4, request.devices, 1, False, True)
        best = np.mean([min(mean_over_ideal(c, w, [1, 1], "even") for c in rows) for w in windows.transpose(1, 0, 2)])
        assert found.solver.bound == pytest.approx(best, rel=CLOSE)
        assert found.solver.gap == pytest.approx(1 - best / found.solver.objective, abs=CLOSE)


def test_equal_inputs_give_equal_placements():
    for movement in ("coherent", "ep"):
        trace, request = random_single(3, movement)
        a, b = (place(trace, request) for _ in range(2))
        assert a.layers == b.layers
    counts = Trace.of_counts(np.array([[9, 7, 6, 5, 1.0], [3, 3, 2, 8, 1]]))
    request = Request(even_fleet(2, 1, 8, False), 8, objective="balance")
    assert place(counts, request).layers == place(counts, request).layers


@pytest.fixture
def moeplan(capfd, tmp_path, monkeypatch):
    """Run a command in a folder: exit code, standard output, standard error without line breaks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["moeplan", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capfd.readouterr()
        return stopped.value.code, captured.out, " ".join(captured.err.split())

    return run


README = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]


@pytest.mark.parametrize(("groups", "hottest"), [(4, (151, 179.5)), (1, (136, 172))])
def test_eplb_readme_is_proven(moeplan, groups, hottest):
    Trace.of_counts(np.array(README)).write("eplb.npz")
    options = ("--devices", "8", "--hosts", "2", "--slots", "16", "--groups", groups, "--time-limit", "120")
    code, out, _ = moeplan("place", "--trace", "eplb.npz", *options)
    assert code == 0
    assert "proven optimal by exact program (HiGHS)" in out
    solver = Placement.read("place.json").solver
    ideal = np.sum(README, axis=1) / 8
    assert solver.objective == pytest.approx(np.mean(np.array(hottest) / ideal))
    assert (solver.gap, solver.status) == (0, "optimal")


def test_full_slots_and_whole_counts_are_known_to_the_bound(moeplan):
    Trace.of_counts(np.array([[5, 4, 3, 2, 1, 1, 1, 1]])).write("one.npz")
    code, out, _ = moeplan("place", "--trace", "one.npz", "--devices", "4")
    assert code == 0
    assert "proven optimal" in out
    solver = Placement.read("place.json").solver
    assert solver.bounds["balance"] == solver.objective == pytest.approx(6 / 4.5)
    # One copy on each of two devices: heaviest and lightest are together, or three are.
    assert balance_bound(np.array([3.0, 1, 1, 1]), np.ones(2), np.array([2, 2])) <= 4


def test_a_layer_without_tokens_counts_one_everywhere(moeplan):
    Trace.of_counts(np.array([[0] * 8, [5, 4, 3, 2, 1, 1, 1, 1]])).write("empty.npz")
    code, _, _ = moeplan("place", "--trace", "empty.npz", "--devices", "4")
    assert code == 0
    placed, expected = Placement.read("place.json"), (1 + 6 / 4.5) / 2
    assert placed.solver.objective == placed.solver.bound == pytest.approx(expected)
    assert placed.scores["placement"].fit.balance_mean == pytest.approx(expected)
    _, out, _ = moeplan("explain", "place.json", "--trace", "empty.npz", "--json")
    slot = json.loads(out)["explanation"]["one_more_slot"]
    assert slot["now"] == slot["same_slots"] == slot["same_slots_bound"] == pytest.approx(expected)
    _, out, _ = moeplan("trace", "stats", "empty.npz", "--devices", "4", "--json")
    stats = json.loads(out)["device_imbalance"]
    assert stats == [1.0, 2.0]
    assert np.mean(stats) == pytest.approx(placed.scores["linear"].fit.balance_mean)
    _, out, _ = moeplan("compare", "place.json", "place.json", "--trace", "empty.npz", "--json")
    assert json.loads(out)["a"]["fit"]["balance_mean"] == pytest.approx(expected)


def test_empty_layers_of_samples_do_not_loosen_or_tighten_a_cap():
    """Three devices for eight experts: evenly loaded experts would not be balanced, no experts are."""
    load = np.array([[[0.0] * 8, [3, 2, 2, 1, 1, 1, 1, 1]], [[0] * 8, [1, 1, 1, 1, 1, 1, 1, 1]]])
    placed = np.tile([0, 0, 0, 1, 1, 1, 2, 2], (2, 1))
    per_device = np.stack([[np.bincount(d, w, 3) for d, w in zip(placed, sample, strict=True)] for sample in load])
    assert mean_balance(placed, load, np.ones(3)) == pytest.approx(float(balance(per_device).mean()))
    assert balance(np.zeros((2, 3))).tolist() == [1, 1]
    assert over_ideal([0.0, 0.0]).tolist() == [1, 1]
    assert over_ideal([4.0, 2.0], [2.0, 1.0]).tolist() == [1, 1]


def test_constant_routing_moves_nothing_and_is_warned_of(moeplan):
    Trace.of(np.broadcast_to([[0, 1], [2, 3]], (64, 2, 2)).copy(), 4).write("same.npz")
    code, out, err = moeplan("place", "--trace", "same.npz", "--devices", "2")
    assert code == 0
    assert "0 = " in out
    assert "proven optimal" in out
    assert "all 64 tokens choose the same experts in every layer" in err
    solver = Placement.read("place.json").solver
    assert (solver.objective, solver.bound, solver.gap) == (0, 0, 0)
    assert "same experts in every layer" in moeplan("trace", "stats", "same.npz", "--devices", "2")[2]


@pytest.mark.parametrize("padding", [0.1, 0.5])
def test_padding_is_warned_of_and_chance_is_not(moeplan, padding):
    rng = np.random.default_rng(0)
    ids = random_ids(rng, 200, 4, 8, 2)
    ids[rng.random(200) < padding] = ids[0]
    Trace.of(ids, 8).write("t.npz")
    warned = "of the tokens choose the same experts" in moeplan("trace", "stats", "t.npz")[2]
    assert warned == (padding > 0.25)
    one_layer = np.zeros((100, 1, 1), int)
    one_layer[:40] = 1
    Trace.of(one_layer, 4).write("u.npz")  # more than half choose expert 0, as its load says
    assert "same experts" not in moeplan("trace", "stats", "u.npz", "--devices", "4")[2]


def test_an_impossible_cap_is_refused_with_its_proof(moeplan):
    Trace.of(random_ids(np.random.default_rng(1), 40, 2, 4, 1), 4).write("t.npz")
    code, _, err = moeplan("place", "--trace", "t.npz", "--devices", "2", "--balance-cap", "1")
    assert code == 2
    assert "no placement has a mean balance of 1 or less: it is proven to be at least" in err
    assert issubclass(Infeasible, Exception)

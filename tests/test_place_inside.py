"""Placements inside ``solve``: what is proven, what copies gain, and the brute force over everything."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner import few
from moeplan.planner.budget import Budget
from moeplan.planner.costs import Costs
from moeplan.planner.place import inside, inside_copies, ready
from moeplan.planner.place.fleet import Fleet
from moeplan.planner.place.inside import placements_for, usual
from moeplan.planner.place.layers import plan_layers
from moeplan.planner.place.question import Question
from moeplan.planner.search import solve
from moeplan.planner.space import Search
from moeplan.planner.splits import expert_seconds
from moeplan.solvers.compiled import load_all
from moeplan.solvers.slots import Slots
from moeplan.spec import Trace, Workload
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import draw_routing
from moeplan.tests.routings import random_trace
from moeplan.tests.synthetic import cluster, tiny_model

PREFILL = Workload.from_text("prefill:256@32")


def asked(
    seed: int, layers: int, experts: int, devices: int, hosts: int, slots: int, top_k: int = 2, identity: float = 0.0
) -> Question:
    """A random question; ``slots`` on every device; identity: share of the choices that fall on identity experts."""
    rng = np.random.default_rng(seed)
    ids = random_trace(seed, layers, experts, 60, top_k).expert_ids
    ids = np.where(np.random.default_rng(seed).random(ids.shape) < identity, -1, ids)
    counts = np.stack([np.bincount(ids[:, layer].ravel() + 1, minlength=experts + 1)[1:] for layer in range(layers)])
    load, speed = counts * rng.uniform(0.5, 1.5, counts.shape) + 0.1, rng.uniform(0.4, 1.6, devices)
    where = np.sort(np.arange(devices) % hosts)
    fleet = Fleet(speed, np.full(devices, slots), where, tuple(map(str, range(hosts))))
    inner = float(rng.uniform(0.0, 40.0))
    weights = (inner, inner * float(rng.uniform(1.0, 4.0)))
    return Question(tuple(ids.transpose(1, 0, 2)), counts, load, fleet, weights, load.sum(1) / speed.sum())


def plainly(question: Question, c: int, row: tuple[int, ...]) -> float:
    """The objective of one class, token by token."""
    fleet, (near, far) = question.fleet, question.weights
    moved = 0.0
    for token in question.ids[c]:
        devices = {row[e] for e in token if e >= 0}
        moved += near * len(devices) + (far - near) * len({fleet.hosts[g] for g in devices})
    busy = [sum(question.load[c, e] for e in range(len(row)) if row[e] == g) for g in range(len(fleet.speed))]
    hottest = max(b / s for b, s in zip(busy, fleet.speed, strict=True))
    ideal = question.load[c].sum() / fleet.speed.sum()
    return moved / len(question.ids[c]) + question.ideal[c] * hottest / ideal


SIZES = st.sampled_from([(2, 4, 2, 1, 4), (2, 4, 2, 2, 2), (1, 5, 3, 2, 2), (3, 4, 3, 3, 3), (1, 6, 2, 1, 3)])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**20), SIZES, st.integers(1, 3), st.sampled_from([0.0, 0.3, 0.8]))
def test_small_placements_are_proven_and_brute_force_agrees(seed, size, top_k, identity):
    layers, experts, devices, hosts, slots = size
    question = asked(seed, layers, experts, devices, hosts, slots, top_k, identity)
    found = placements_for(question, seed=0, budget=Budget.of(60), copies=False)
    local = found["local"]
    assert local.solver == "all arrangements"
    objective, bound = local.proof()
    rows = [r for r in itertools.product(range(devices), repeat=experts) if max(map(r.count, range(devices))) <= slots]
    for c in range(layers):
        best = min(plainly(question, c, row) for row in rows)
        assert objective[c] == pytest.approx(best)
        assert bound[c] == pytest.approx(best)
        assert question.least()[c] <= best * (1 + 1e-9)
    for other in (*found.values(), *usual(question, measured=True).values()):
        value, least = other.proof()
        assert (value >= least * (1 - 1e-9)).all()


def device_of(slots: Slots) -> np.ndarray:
    placed = np.empty((len(slots.expert_of), slots.num_experts), int)
    for row, experts in zip(placed, slots.expert_of, strict=True):
        row[experts[experts >= 0]] = slots.device_of_slot[experts >= 0]
    return placed


@pytest.mark.parametrize("identity", [0.0, 0.4])
def test_larger_ones_are_annealed_and_no_worse_than_greedy(identity):
    question = asked(3, 4, 24, 4, 2, 12, identity=identity)
    found = placements_for(question, seed=0, budget=Budget.of(60), copies=False)
    local = found["local"]
    assert local.solver == "annealing"
    objective, bound = local.proof()
    assert (question.least() == bound).all()
    assert objective.sum() < usual(question, measured=True)["weighted"].proof()[0].sum()
    assert objective == pytest.approx(
        [plainly(question, c, tuple(row)) for c, row in enumerate(device_of(local.slots))]
    )
    again = placements_for(question, seed=0, budget=Budget.of(60), copies=False)
    assert (again["local"].slots.expert_of == local.slots.expert_of).all()


def test_a_search_that_the_clock_ended_says_so():
    question = asked(3, 40, 64, 4, 2, 24)
    load_all()
    found = placements_for(question, seed=0, budget=Budget.of(0.5), copies=True)
    assert found["local"].solver == "annealing, cut short by the time limit"
    for placed in found.values():
        assert all((placed.slots.copies > 0).all(axis=1))


def test_without_slots_for_all_experts_there_is_only_linear():
    question = asked(1, 2, 6, 2, 1, 2)
    assert usual(question, measured=True).keys() == {"linear"}
    assert placements_for(question, seed=0, budget=Budget.of(60), copies=True) == {}


def test_no_time_to_load_the_solvers_leaves_what_needs_none(monkeypatch):
    monkeypatch.setattr(inside, "solvers_ready", lambda *_, **__: False)
    assert placements_for(asked(3, 2, 24, 4, 2, 12), seed=0, budget=Budget.of(60), copies=True) == {}
    exact = placements_for(asked(3, 2, 4, 2, 1, 4), seed=0, budget=Budget.of(60), copies=True)
    assert "local" in exact
    assert not any(name.startswith("replicated") for name in exact)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([(2, 6, 2, 1, 4), (2, 8, 4, 2, 3), (1, 9, 3, 3, 9)]))
def test_copies_keep_to_slots_and_their_balance_is_bounded(seed, size):
    layers, experts, devices, hosts, slots = size
    question = asked(seed, layers, experts, devices, hosts, slots)
    found = placements_for(question, seed=1, budget=Budget.of(60), copies=True)
    copies = {name: placed for name, placed in found.items() if name.startswith("replicated")}
    single, ideal = found["local"].slots, question.load.sum(1) / question.fleet.speed.sum()
    for name, placed in copies.items():
        for layer, plan in enumerate(plan_layers(placed.slots, near=placed.near)):
            assert all(len(held) <= slots for held in plan.slots)
            assert {e for held in plan.slots for e in held} == set(range(experts))
            assert (plan.shares is None) == (placed.near or sum(map(len, plan.slots)) == experts), layer
        value, bound = placed.proof()
        assert value == pytest.approx(placed.slots.hottest(question.load, question.fleet.speed) / ideal)
        assert (bound <= value * (1 + 1e-9)).all()
        alone = single.hottest(question.load, question.fleet.speed) / ideal
        copied = (placed.slots.copies > 1).any(axis=1)
        assert copied.any(), name
        assert (value[copied] < alone[copied] - 0.0099).all()  # else they are no option
        assert value[~copied] == pytest.approx(alone[~copied])


def hot_trace(layers: int, experts: int, tokens: int = 512) -> Trace:
    """Every token needs expert 0, and one of the others."""
    rng = np.random.default_rng(0)
    other = rng.integers(1, experts, (tokens, layers))
    return Trace.of(np.stack([np.zeros_like(other), other], 2), experts, seq_len=np.full(tokens // 32, 32))


def test_a_hot_expert_gets_copies_and_the_step_is_faster(monkeypatch):
    model = tiny_model(layers=2, hidden=256, ffn=1024)
    machines, trace = cluster(model, uplink=1e10, local=1e10), hot_trace(2, 8)

    @functools.cache
    def found():
        return solve(model, machines, PREFILL, trace, strategy="ep", memory_bytes=60 * 2**20)

    plan, again = found(), found.__wrapped__()
    assert again.model_copy(update={"solve_seconds": plan.solve_seconds}) == plan
    assert {record.method.split(",")[0] for record in plan.placements} == {"replicated"}
    assert all(sum(0 in held for held in layer.slots) > 1 for layer in plan.layers)
    assert "replicated" in plan.solver.space
    assert sorted(layer for record in plan.placements for layer in record.layers) == [0, 1]
    monkeypatch.setattr(inside_copies, "fits_tables", lambda devices, experts: False)
    without = found.__wrapped__()
    assert plan.solver.objective < 0.92 * without.solver.objective
    assert "replicated" not in without.solver.space


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("workload", ["prefill:256@32", "decode:16@512"])
def test_copies_never_make_the_prediction_worse(seed, workload, monkeypatch):
    model = tiny_model(layers=4, hidden=128, ffn=512)
    machines, trace = cluster(model, ((1.0, 0.6), (0.8, 0.3))), random_trace(seed, 4, 8)
    monkeypatch.setattr(few, "MOST_LAYERS", 0)
    options = {"strategy": "ep", "memory_bytes": 20 * 2**20}
    with_copies = solve(model, machines, Workload.from_text(workload), trace, **options)
    monkeypatch.setattr(inside_copies, "fits_tables", lambda devices, experts: False)
    without = solve(model, machines, Workload.from_text(workload), trace, **options)
    assert with_copies.solver.objective <= without.solver.objective * (1 + 1e-12)


def test_what_there_is_no_time_for_is_said(monkeypatch):
    """Where the solvers cannot be loaded in time, the plan claims no search for placements."""
    model = tiny_model(layers=2, experts=16)
    plan = solve(model, cluster(model), PREFILL, strategy="ep")
    assert "local" in plan.solver.space
    assert not any(note.startswith("no time for") for note in plan.notes)
    monkeypatch.setattr(ready, "SOLVERS", "of a process that has not loaded them")
    for name in ("LOAD_TIME", "LOAD_ALL_TIME"):
        monkeypatch.setattr(ready, name, 100.0)
    hurried = solve(model, cluster(model), PREFILL, strategy="ep", time_limit=1.0)
    assert "local" not in hurried.solver.space
    assert "replicated" not in hurried.solver.space
    assert any(note.startswith("no time for a search (") for note in hurried.notes)


def test_every_layer_of_ep_says_who_placed_it():
    model = tiny_model(layers=4)
    plan = solve(model, cluster(model, ((1.0, 1.0), (0.4, 0.4))), PREFILL, strategy="ep")
    layers = [layer for record in plan.placements for layer in record.layers]
    assert sorted(layers) == [0, 1, 2, 3]
    for record in plan.placements:
        assert 0 < record.bound <= record.objective
        assert record.gap == pytest.approx((record.objective - record.bound) / record.objective)
        assert record.solver
    other = solve(model, cluster(model), PREFILL, strategy="sharded")
    assert other.placements == ()


@pytest.mark.parametrize("workload", ["prefill:64@16", "decode:8@128"])
@pytest.mark.parametrize("speeds", [((1.0, 0.3),), ((1.0,), (0.6,)), ((1.0, 1.0),)], ids=str)
@pytest.mark.parametrize("strategy", [None, "ep"])
def test_brute_force_over_placements_options_and_layouts_agrees(speeds, workload, strategy):
    """Two devices, four experts: all placements, in all layouts and degrees, simulated whole."""
    model, step_of = tiny_model(layers=2, experts=4), Workload.from_text(workload)
    machines = cluster(model, speeds)
    plan = solve(model, machines, step_of, strategy=strategy)
    assert plan.solver.gap == 0
    assert plan.solver.status == "optimal"
    assert "every single-copy" in plan.solver.space
    costs, routing = Costs(machines, model, "f32"), draw_routing(None, model, step_of, 0)
    strategies = ("ep", "sharded", "gathered") if strategy is None else ("ep",)
    limits = [m.limit for m in plan.predicted.memory]
    space = Search(costs, model, step_of, routing, limits, strategies, 2, False, 0, Budget.of(float("inf")))
    best = np.inf
    for _, step in space._steps():
        for degree in space.degrees:
            columns = space._tables(step, degree, thorough=True).columns
            offered = [[column.plans[c] for column in columns] for c in range(2)]
            everywhere = [
                LayerPlan(strategy="ep", slots=tuple(tuple(e for e in range(4) if row[e] == g) for g in range(2)))
                for row in itertools.product(range(2), repeat=4)
            ]
            options = [{*mine, *(everywhere if degree == 2 else [])} for mine in offered]
            if degree == 2:
                assert all(set(everywhere) <= set(mine) for mine in offered)
            best = min(best, *(step.seconds(list(chosen)) for chosen in itertools.product(*options)))
    assert plan.solver.objective == pytest.approx(best, rel=1e-9)


def test_the_space_is_settled_only_where_a_gap_is_left(monkeypatch):
    """With the look at every plan turned off the bound stays where it was, and the plan is no better."""
    model = tiny_model(layers=2)
    machines = cluster(model, ((1.0, 0.2),))
    settled = solve(model, machines, PREFILL)
    monkeypatch.setattr(few, "MOST_LAYERS", 0)
    loose = solve(model, machines, PREFILL)
    assert settled.solver.objective <= loose.solver.objective
    assert settled.solver.bound >= loose.solver.bound
    assert loose.solver.gap > 0 == settled.solver.gap


def test_an_expert_weighs_what_its_call_takes():
    """Few rows cost as much as the weights that are read: experts of 1 and of 8 rows weigh about alike in decode."""
    model = tiny_model(layers=1, hidden=256, ffn=1024)
    machines = cluster(model, ((1.0, 0.5),))
    costs = Costs(machines, model, "f32")
    counts = np.array([[1, 8, 0, 512, 1, 1, 1, 1]])
    seconds, speed = expert_seconds(costs, model, counts)
    assert seconds[0, 2] == 0
    assert seconds[0, 1] < 1.5 * seconds[0, 0]
    assert seconds[0, 3] > 5 * seconds[0, 0]
    assert speed.mean() == pytest.approx(1)
    block = model.moe_block()
    for device in range(2):
        whole = float(costs.expert_ffn(block, 1024, counts[0], device))
        estimated = seconds.sum() / speed[device]
        assert 0.5 < whole / estimated < 2

"""What the next layer needs, foreseen: probabilities and lists by brute force, what a plan may say, and hit rates."""

import functools
import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner import foresight as planned
from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.runtime.executor import Executor
from moeplan.runtime.launch import LocalLauncher, Rank
from moeplan.runtime.random_weights import RandomWeights
from moeplan.spec import Plan, Trace, Workload
from moeplan.spec.errors import MoeplanError
from moeplan.spec.foresight import Foreseen, Foresight, foreseen, resting, written
from moeplan.spec.offload import Offload
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import draw_routing
from moeplan.tests.plans import hand_made_plan
from moeplan.tests.synthetic import cluster, tiny_model

LAYERS, EXPERTS, TOP_K = 4, 8, 2
MODEL = tiny_model(layers=LAYERS, hidden=64, ffn=128, experts=EXPERTS)
DECODE = Workload.from_text("decode:2@64")


def choices(tokens: int, layers: int, seed: int) -> np.ndarray:
    """[T, L, K]"""
    return np.random.default_rng(seed).random((tokens, layers, EXPERTS)).argsort(-1)[..., :TOP_K]


# what follows what ---------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(2, 4), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_what_follows_what_by_counting(tokens, layers, seed):
    ids = choices(tokens, layers, seed)
    found = planned.follows(ids, EXPERTS)
    assert found.shape == (layers - 1, EXPERTS, EXPERTS)
    for j, f, e in np.ndindex(found.shape):
        those = [token for token in ids if f in token[j]]
        then = sum(e in token[j + 1] for token in those)
        often = sum(e in token[j + 1] for token in ids) / tokens
        assert found[j, f, e] == pytest.approx((then + planned.PRIOR * often) / (len(those) + planned.PRIOR))
    assert ((found >= 0) & (found <= 1)).all()


def test_the_steps_own_tokens_are_left_out():
    ids = choices(60, LAYERS, 1)
    trace = Trace.of(ids, EXPERTS, seq_len=np.full(6, 10))
    workload = Workload.from_text("decode:6@8")
    step = draw_routing(trace, MODEL, workload, 3).expert_ids
    others = planned.other_tokens(trace, workload, 3)
    assert len(others) == 54
    together = np.concatenate([step, others]).reshape(60, -1)
    assert sorted(map(tuple, together)) == sorted(map(tuple, ids.reshape(60, -1)))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_probability_is_written_in_one_byte(values):
    read = Foresight(least=0.5, tokens=1, chances=(written(np.array([values])),)).table(1)
    assert read.shape == (1, len(values))
    for q, step in zip(values, read[0].tolist(), strict=True):
        assert abs(q - step / 256) <= (1 / 512 if q <= 255.5 / 256 else 1 / 256)


@given(st.integers(0, 6), st.integers(1, 3), st.floats(0.01, 0.99), st.integers(0, 2**16))
@settings(max_examples=100, deadline=None)
def test_the_list_is_of_what_the_formula_finds_likely(rest, top_k, least, seed):
    rng = np.random.default_rng(seed)
    experts = np.sort(rng.permutation(EXPERTS)[:rest])
    steps = rng.integers(0, 256, (rest, EXPERTS)).astype(np.uint8)
    chosen = rng.integers(0, 3, EXPERTS)
    chances = {}
    for expert, row in zip(experts.tolist(), steps.tolist(), strict=True):
        left_out = math.prod((1 - q / 256) ** (n / top_k) for q, n in zip(row, chosen.tolist(), strict=True))
        chances[expert] = 1 - left_out
    got = Foreseen(experts, steps, least, top_k).ahead(chosen)
    close = {expert for expert, p in chances.items() if abs(p - least) < 1e-12}
    assert set(got) - close == {expert for expert, p in chances.items() if p >= least} - close
    assert all(chances[a] >= chances[b] - 1e-12 for a, b in itertools.pairwise(got))


def test_tokens_that_are_sure_of_what_follows():
    """Expert 3 follows expert 1 and nothing else does: it is read ahead exactly where a token chose 1."""
    steps = np.zeros((2, 4), np.uint8)
    steps[1, 1] = 255
    known = Foreseen(np.array([0, 3]), steps, 0.9, 1)
    assert known.ahead(np.array([5, 1, 5, 5])) == (3,)
    assert known.ahead(np.array([5, 0, 5, 5])) == ()


# what a plan may say -------------------------------------------------------------------------------------------------

HALF = {"slots": (tuple(range(EXPERTS)),), "resident": ((0, 1),)}


def plan_of(chances: list[tuple[str, ...]], ahead: tuple[int, ...] = ()) -> Plan:
    layers = [LayerPlan(strategy="offload", ahead=(ahead,), **HALF)] * LAYERS
    offload = Offload(folder="/disk", places=(2,), foresight=Foresight(least=0.5, tokens=9, chances=tuple(chances)))
    return hand_made_plan(MODEL, DECODE, layers, tokens=(2,), offload=offload)


ROW = "80" * EXPERTS
RIGHT = [(ROW,) * 6] * (LAYERS - 1)


def test_it_is_written_and_read():
    plan = plan_of(RIGHT)
    assert Plan.parse(plan.to_json(), "plan") == plan
    own = foreseen(plan.offload.foresight, 1, plan.layers[1].slots, plan.layers[1].resident, TOP_K, 0)
    assert own.experts.tolist() == [2, 3, 4, 5, 6, 7]
    assert (own.chances == 128).all()


@pytest.mark.parametrize(
    ("chances", "ahead", "said"),
    [
        (RIGHT[1:], (), "foresight.chances: 2 lists, expected one for each layer but the first"),
        ([RIGHT[0], (ROW,) * 5, RIGHT[0]], (), "foresight.chances[1]: 5 experts, but 6 of layer 2 rest"),
        ([RIGHT[0], RIGHT[0], (ROW[2:],) * 6], (), "foresight.chances[2]: expected 16 digits for each expert"),
        (RIGHT, (4,), "layers[1].ahead: what it needs is foreseen; only the first layer has a list"),
    ],
)
def test_plans_that_contradict_themselves(chances, ahead, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        plan_of(chances, ahead)


def test_rows_that_are_no_numbers_are_refused():
    text = plan_of(RIGHT).to_json().replace(ROW, "xy" * EXPERTS)
    with pytest.raises(MoeplanError, match=r"offload\.foresight\.chances"):
        Plan.parse(text, "plan")


# the search ----------------------------------------------------------------------------------------------------------


def following(tokens: int, sure: float, seed: int = 0) -> Trace:
    """A token's experts in a layer are with probability ``sure`` those of the layer before, shifted by one."""
    rng, ids = np.random.default_rng(seed), choices(tokens, LAYERS, seed)
    for j in range(1, LAYERS):
        same = rng.random(tokens) < sure
        ids[same, j] = (ids[same, j - 1] + 1) % EXPERTS
    return Trace.of(ids, EXPERTS)


@functools.cache
def machines(disk: float = 4e8):
    return cluster(MODEL, ((1.0, 0.5),), memory=2**30, disk=disk)


@functools.cache
def solved(sure: float, text: str = "decode:4@64", share: float = 0.3) -> tuple[Plan, Trace]:
    """Where memory holds that share of the experts."""
    trace, workload = following(600, sure), Workload.from_text(text)
    whole = solve(MODEL, machines(), workload, trace, strategy="ep")
    limit = max(m.total - int((1 - share) * m.weights) for m in whole.predicted.memory)
    return solve(MODEL, machines(), workload, trace, strategy="offload", memory_bytes=limit), trace


def test_it_takes_the_place_of_lists_where_it_is_predicted_faster():
    plan, trace = solved(0.95)
    assert plan.offload.foresight is not None
    assert plan.offload.foresight.tokens == 596
    assert any("foreseen from what the layer before needs, by 596 other tokens" in note for note in plan.notes)
    assert Plan.parse(plan.to_json(), "plan") == plan
    step = Step.of(plan, machines(), trace)
    assert step.seconds(list(plan.layers)) == pytest.approx(plan.solver.objective)
    assert all(m.total <= m.limit for m in plan.predicted.memory)
    reads = plan.predicted.reads
    assert reads.ahead > 0.7 * reads.needed > 0
    by_lists = Step(step.costs, MODEL, step.layout, step.routing, step.places)
    for lists in (
        [((),) * len(layer.slots) for layer in plan.layers],  # nothing is read ahead, and everything that rests
        [tuple(tuple(sorted(set(h) - set(r))) for h, r in zip(p.slots, p.resident, strict=True)) for p in plan.layers],
    ):
        layers = [layer.model_copy(update={"ahead": ahead}) for layer, ahead in zip(plan.layers, lists, strict=True)]
        assert by_lists.seconds(layers) > plan.solver.objective


def test_lists_stay_where_nothing_follows_from_the_layer_before():
    plan, _ = solved(0.0)
    assert plan.offload.foresight is None
    assert any("by the lists of the plan" in note for note in plan.notes)


def test_without_tokens_or_with_too_many_experts_nothing_is_foreseen():
    trace = following(100, 1.0)
    assert planned.can_foresee(trace, EXPERTS)
    assert not planned.can_foresee(None, EXPERTS)
    assert not planned.can_foresee(Trace.of_counts(trace.expert_counts), EXPERTS)
    assert not planned.can_foresee(trace, 2**11)
    assert not planned.can_foresee(Trace.of(trace.expert_ids[:, :1], EXPERTS), EXPERTS)


@pytest.mark.parametrize("sure", [0.95, 0.0])
@pytest.mark.parametrize("text", ["decode:4@64", "decode:7@64"])
def test_hit_rates_by_brute_force(sure, text):
    plan, trace = solved(sure, text)
    routing = draw_routing(trace, MODEL, plan.workload, plan.routing.seed)
    needed = listed = ahead = 0
    for j, layer in enumerate(plan.layers):
        now = set(routing.expert_ids[:, j].ravel().tolist())
        for g, (held, stays) in enumerate(zip(layer.slots, layer.resident, strict=True)):
            rest = set(held) - set(stays)
            if j == 0 or plan.offload.foresight is None:
                early = set(layer.ahead[g])
            else:
                table = plan.offload.foresight.table(j) / 256
                rows = resting(layer.slots, layer.resident)
                early = set()
                for e in rest:
                    out = 1.0
                    for f in routing.expert_ids[:, j - 1].ravel().tolist():
                        out *= (1 - table[rows.index(e), f]) ** (1 / TOP_K)
                    if 1 - out >= plan.offload.foresight.least:
                        early.add(e)
            needed, listed, ahead = needed + len(now & rest), listed + len(early), ahead + len(now & early)
    found = plan.predicted.reads
    assert (found.needed, found.listed, found.ahead) == (needed, listed, ahead)
    assert 0 <= found.vain <= listed - ahead
    assert needed


# the run -------------------------------------------------------------------------------------------------------------


def on_rank(rank: Rank, job: dict) -> list[int]:
    """What one step of a plan read."""
    plan = Plan.parse(job["plan"], "plan")
    executor = Executor(
        plan,
        rank.rank,
        RandomWeights(plan.model, torch.float32, 1),
        device=rank.device,
        capacity=plan.workload.context + plan.workload.length,
    )
    routing = draw_routing(Trace.read(job["trace"]), plan.model, plan.workload, plan.routing.seed)
    executor.cache.fill(plan.workload.context, 0)
    tokens = torch.zeros(plan.tokens[rank.rank], dtype=torch.int64)
    executor.step(tokens, executor.layout, plan.workload.context, forced=executor.forced(routing, executor.layout))
    return list(executor.reads())


@pytest.mark.parametrize("sure", [0.95, 0.0])
def test_the_ranks_read_what_is_expected(tmp_path, sure):
    plan, trace = solved(sure)
    offload = plan.offload.model_copy(update={"folder": str(tmp_path)})
    plan = plan.model_copy(update={"offload": offload})
    job = {"plan": plan.to_json(), "trace": str(trace.write(tmp_path / "trace.npz"))}
    needed, listed, ahead, _, hosted = np.sum(
        LocalLauncher(2).run("moeplan.tests.test_foresight:on_rank", job, timeout=60), axis=0
    )
    expected = plan.predicted.reads
    assert (needed, listed, ahead, hosted) == (expected.needed, expected.listed, expected.ahead, 0)

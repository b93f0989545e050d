"""Coherent decoding equals the single-process reference, step after step; what moves is what the planner counts."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeplan.runtime import attention as attention_module
from moeplan.runtime.attention import Batch, RotaryEmbedding, attention
from moeplan.runtime.cache import LayerCache
from moeplan.runtime.check import gather_rows
from moeplan.runtime.coherent import executor_of
from moeplan.runtime.launch import LocalLauncher, Rank
from moeplan.runtime.random_weights import RandomWeights
from moeplan.runtime.reference import ReferenceModel
from moeplan.runtime.vocabulary import head
from moeplan.spec import Model, MoeplanError, Plan
from moeplan.spec.model import Attention, Block, Dense, Gate, Moe
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import Routing
from moeplan.tests.plans import even_slots, hand_made_plan

STEPS, EXPERTS, TOLERANCE = 8, 8, {"f32": 1e-4, "bf16": 5e-2}
NARROW = Attention(heads=4, kv_heads=2, head_dim=8, qk_norm="full")
WIDE = Attention(heads=4, kv_heads=4, head_dim=8, sliding_window=3)


def model(top_k: int) -> Model:
    """Dense layers first and last, layers with two sizes of keys, one without attention; top-2 has a shared expert."""
    moe = Moe(num_experts=EXPERTS, top_k=top_k, ffn_size=24, shared_ffn_size=16 if top_k > 1 else 0, gate=Gate())
    dense = Dense(ffn_size=40)
    blocks = (
        Block(hidden_size=32, attention=NARROW, dense=dense),
        Block(count=2, hidden_size=32, attention=NARROW, moe=moe),
        Block(hidden_size=32, moe=moe),
        Block(hidden_size=32, attention=WIDE, moe=moe),
        Block(hidden_size=32, attention=NARROW, dense=dense),
    )
    return Model(name="small", family="test", vocab_size=61, rope_theta=1e4, blocks=blocks, dtype="f32")


# By number of devices: copies on several of them, and devices that hold nothing.
COPIES = {
    1: (tuple(range(8)),),
    2: ((0, 1, 2, 3, 7), (3, 0, 7, 4, 5, 6)),
    4: ((0, 1, 2), (2, 0, 3, 4), (), (5, 6, 7, 0)),
}
UNEVEN = {1: (tuple(range(8)),), 2: ((5,), (0, 1, 2, 3, 4, 6, 7)), 4: ((7, 1), (), (0, 2, 3, 4, 6), (5,))}
IDLE = {1: (tuple(range(8)),), 2: ((), tuple(range(8))), 4: ((), (), tuple(range(8)), ())}
TOKENS = {1: (7,), 2: (6, 1), 4: (3, 0, 4, 1)}


def cases(world: int) -> dict[str, tuple[int, tuple[LayerPlan, ...], str, str]]:
    """name -> top-k, layers, routing (the router's, or forced on few experts or one), dtype."""

    def layers(*slots, shares=None):
        return tuple(LayerPlan(strategy="coherent", slots=own, shares=shares) for own in slots)

    parts = [{e: 0.3 + 0.1 * e + g for e in held} for g, held in enumerate(COPIES[world])]
    shares = tuple(tuple(part / sum(p.get(e, 0) for p in parts) for e, part in held.items()) for held in parts)
    even, copies, uneven = even_slots(EXPERTS, world), COPIES[world], UNEVEN[world]
    return {
        "even": (2, layers(even), "own", "f32"),
        "top-1": (1, layers(even, uneven), "own", "f32"),
        "copies": (2, layers(copies, uneven), "own", "f32"),
        "shares": (3, layers(copies, shares=shares), "own", "f32"),
        "one device works": (2, layers(IDLE[world]), "own", "f32"),
        "random": (3, layers(uneven, copies, even), "random", "f32"),
        "skewed": (2, layers(even, copies), "skewed", "f32"),
        "bf16": (2, layers(copies, even), "random", "bf16"),
    }


def case_plan(world: int, name: str) -> Plan:
    top_k, layers, _, dtype = cases(world)[name]
    return hand_made_plan(model(top_k), f"decode:{sum(TOKENS[world])}@0", layers, tokens=TOKENS[world], dtype=dtype)


def routing_of(plan: Plan, kind: str, step: int) -> Routing | None:
    """Another one in each step; None where the routers choose."""
    if kind == "own":
        return None
    moe, rng = plan.model.moe_block().moe, np.random.default_rng(step)
    shape = plan.workload.tokens, len(plan.model.moe_layers)
    popularity = 9.0 ** -np.arange(EXPERTS) if kind == "skewed" else np.ones(EXPERTS)
    scores = np.log(popularity) + rng.gumbel(size=(*shape, EXPERTS))
    gates = np.sort(rng.random((*shape, moe.top_k)).astype(np.float32))[..., ::-1].copy()
    return Routing(np.argsort(-scores)[..., : moe.top_k].astype(np.int32), gates)


def worst_errors(plan: Plan, kind: str, rank: int) -> tuple[float, float]:
    """Over all steps: relative error of the logits, on rank 0, and of this rank's keys and values."""
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[plan.dtype]
    source = RandomWeights(plan.model, dtype, 5)
    executor = executor_of(plan, rank, source, device=torch.device("cpu"), capacity=STEPS + 1)
    options = {"sequences": plan.workload.tokens, "capacity": STEPS + 1, "dtype": dtype}
    reference, layout = ReferenceModel(plan.model, source, **options), executor.layout
    tokens = torch.randint(61, (STEPS, plan.workload.tokens), generator=torch.Generator().manual_seed(1))
    worst = 0.0
    for step in range(STEPS):
        routing = routing_of(plan, kind, step)
        forced = executor.forced(routing, layout) if routing else None
        logits = gather_rows(executor.step(tokens[step][layout.own], layout, step, forced=forced).logits, layout.tokens)
        hidden = reference.forward_hidden(source.embedding()[tokens[step]], routing)
        if rank == 0:
            wanted = hidden_logits(reference, hidden)
            worst = max(worst, relative(logits, wanted))
    held = zip(executor.cache.stacks, reference.cache.stacks, strict=True)
    return worst, max(max(relative(a.keys, b.keys), relative(a.values, b.values)) for a, b in held)


def hidden_logits(reference: ReferenceModel, hidden: torch.Tensor) -> torch.Tensor:
    return head(hidden, reference.weights.final_norm(), reference.model.norm_eps, reference.weights.head())


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    return ((got.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()


def on_rank(rank: Rank, job: dict) -> dict[str, tuple[float, float]]:
    found = {}
    for name, (_, _, kind, _) in cases(rank.world).items():
        found[name] = worst_errors(case_plan(rank.world, name), kind, rank.rank)
        rank.emit({"case": name})
    return found


@contextmanager
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def errors() -> dict[int, list[dict[str, tuple[float, float]]]]:
    """By number of devices, of every rank."""
    entry = "moeplan.tests.test_coherent:on_rank"
    found = {world: LocalLauncher(world, threads=1).run(entry, {}, timeout=120) for world in (2, 4)}
    with one_rank():
        return found | {1: [on_rank(Rank(0, 1, ("here",), torch.device("cpu"), 1, 1.0, lambda event: None), {})]}


@pytest.mark.parametrize(("world", "name"), [(w, name) for w in (1, 2, 4) for name in cases(w)])
def test_eight_steps_equal_the_reference(errors, world, name):
    dtype = cases(world)[name][3]
    assert 0 <= errors[world][0][name][0] < TOLERANCE[dtype]
    assert max(own[name][1] for own in errors[world]) < TOLERANCE[dtype]


def test_prompts_are_refused():
    plan = case_plan(1, "even")
    source = RandomWeights(plan.model, torch.float32, 5)
    executor = executor_of(plan, 0, source, device=torch.device("cpu"), capacity=9)
    longer = type(executor.layout)(0, 1, (14,), (7,), 2)
    with pytest.raises(MoeplanError, match="decode one new token of each sequence at a time, got 2"):
        executor.step(torch.zeros(14, dtype=torch.int64), longer, 0)


@pytest.mark.parametrize("copied", [0, 1 << 30], ids=["stretch by stretch", "copied"])
@pytest.mark.parametrize("context", [0, 1, 6])
@pytest.mark.parametrize("spec", [NARROW, WIDE], ids=["narrow", "wide"])
@given(rows=st.sets(st.integers(0, 8)))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_attention_of_some_sequences_is_that_of_all(monkeypatch, spec, context, copied, rows):
    """Their outputs, their keys and values, and nobody else's cache touched."""
    monkeypatch.setattr(attention_module, "COPIED_BYTES", {"cpu": copied})
    made = model(1).model_copy(update={"blocks": (Block(hidden_size=32, attention=spec),)})
    weights = RandomWeights(made, torch.float32, 7).layer(0).attention
    g = torch.Generator().manual_seed(context)
    x, rows = torch.randn(9, 32, generator=g), torch.tensor(sorted(rows), dtype=torch.int64)
    shape, rope = (9, spec.kv_heads, 8, 8), RotaryEmbedding(1e4)
    whole = LayerCache(torch.randn(shape, generator=g), torch.randn(shape, generator=g))
    some = LayerCache(whole.keys.clone(), whole.values.clone())
    before = whole.keys.clone()
    wanted = attention(x, weights, whole, rope, Batch(9, 1, context))
    got = attention(x[rows], weights, some, rope, Batch(len(rows), 1, context), rows=rows)
    torch.testing.assert_close(got, wanted[rows], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(some.keys[rows], whole.keys[rows], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(some.values[rows], whole.values[rows], rtol=1e-5, atol=1e-6)
    others = [row for row in range(9) if row not in rows.tolist()]
    assert torch.equal(some.keys[others], before[others])

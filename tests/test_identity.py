"""Identity experts (LongCat-Flash): every way to run a model with them equals the reference, which Transformers checks.

Each number of ranks is started once and runs every case, with the routers' own choices and with forced ones.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from moeplan.runtime.check import gather_rows
from moeplan.runtime.coherent import executor_of
from moeplan.runtime.kernels import expert_ffn
from moeplan.runtime.launch import LocalLauncher, Rank
from moeplan.runtime.random_weights import RandomWeights
from moeplan.runtime.reference import ReferenceModel
from moeplan.runtime.router import route, routed
from moeplan.runtime.vocabulary import head
from moeplan.runtime.weights import RouterWeights
from moeplan.spec import Model, Plan, Workload
from moeplan.spec.model import Attention, Block, Dense, Gate, Moe
from moeplan.spec.offload import Offload
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import Routing
from moeplan.tests.plans import even_slots, hand_made_plan
from moeplan.tests.test_executor import COPIES, PLACES, UNEVEN, cases

PROMPT, DECODE, SEQUENCES, TOLERANCE = 5, 4, 3, 1e-4
EXPERTS, ZERO, TOP_K, HIDDEN, FFN = 8, 5, 3, 32, 24
MOE = Moe(
    num_experts=EXPERTS,
    top_k=TOP_K,
    ffn_size=FFN,
    zero_experts=ZERO,
    gate=Gate(score="softmax", normalize=False, scale=2.5, correction_bias=True),
)
ATTENTION = Attention(heads=4, kv_heads=2, head_dim=8)
FORCED = ("some tokens none", "no token any")


def model(shortcut: str = "none", **changes) -> Model:
    """Two layers with experts, each behind a dense one where they have a shortcut."""
    moe = MOE.model_copy(update=changes)
    dense = Block(hidden_size=HIDDEN, attention=ATTENTION, dense=Dense(ffn_size=40))
    block = Block(hidden_size=HIDDEN, attention=ATTENTION, moe=moe, shortcut=shortcut)
    blocks = (block, block) if shortcut == "none" else (dense, block, dense, block)
    return Model(name="identity", family="test", vocab_size=61, blocks=blocks, dtype="f32")


def routing_of(kind: str, tokens: int, layers: int = 2, step: int = 0) -> Routing | None:
    """Choices with -1 for identity experts; None where the routers choose."""
    if kind == "own":
        return None
    rng = np.random.default_rng(step)
    ids = rng.random((tokens, layers, EXPERTS + ZERO)).argsort(2)[:, :, :TOP_K]
    ids[ids >= EXPERTS] = -1
    if kind == "some tokens none":
        ids[::2] = -1
        ids[1::4, 0] = -1
    if kind == "no token any":
        ids[:] = -1
    weights = np.sort(rng.random(ids.shape), axis=2)[:, :, ::-1]
    return Routing(ids.astype(np.int32), weights.astype(np.float32))


def plans(world: int, folder: str) -> dict[str, Plan]:
    """Of prompts, every strategy (see ``test_executor``) and every shortcut."""
    workload = Workload(phase="prefill", tokens=SEQUENCES * PROMPT, sequences=SEQUENCES)
    hosts, found = ["a", "a", "b", "b"][:world], {}
    for name, (tensor, tokens, layers) in cases(world).items():
        hosted = any(layer.host_rows for layer in layers)  # whose experts rest in memory, not on the disk
        tier = "" if hosted else folder
        offload = Offload(folder=tier, places=PLACES[world]) if name.startswith("offload") else None
        made = model(shared_ffn_size=16 if "copies" in name else 0)
        found[name] = hand_made_plan(made, workload, layers, tokens=tokens, tensor=tensor, hosts=hosts, offload=offload)
    alone = [PROMPT * n for n in {1: (3,), 2: (2, 1), 4: (1, 0, 1, 1)}[world]]
    chunks = LayerPlan(strategy="ep", slots=even_slots(EXPERTS, world), chunks=3)
    found["ep, 3 chunks"] = hand_made_plan(model(), workload, [chunks], tokens=alone)
    for shortcut, slot in (("output", 1), ("mid", 2), ("input", 4)):
        layers = [
            LayerPlan(strategy="ep", slots=COPIES[world], slot=slot),
            LayerPlan(strategy="ep", slots=UNEVEN[world], slot=0, chunks=2),
        ]
        found[f"shortcut {shortcut}"] = hand_made_plan(model(shortcut), workload, layers, tokens=alone)
    return found


def coherent_plans(world: int) -> dict[str, Plan]:
    tokens = {1: (7,), 2: (6, 1), 4: (3, 0, 4, 1)}[world]
    layers = [LayerPlan(strategy="coherent", slots=slots) for slots in (COPIES[world], UNEVEN[world])]
    return {
        "coherent": hand_made_plan(model(), f"decode:{sum(tokens)}@0", layers, tokens=tokens),
        "coherent, shared": hand_made_plan(model(shared_ffn_size=16), f"decode:{sum(tokens)}@0", layers, tokens=tokens),
    }


def worst_error(plan: Plan, kind: str, rank: int) -> float:
    """Over a prompt, where there is one, and the steps after it: relative error of the logits, on rank 0."""
    source = RandomWeights(plan.model, torch.float32, 5)
    sequences, capacity = plan.workload.sequences, PROMPT + DECODE
    executor = executor_of(plan, rank, source, device=torch.device("cpu"), capacity=capacity)
    reference = ReferenceModel(plan.model, source, sequences=sequences, capacity=capacity)
    given_tokens = torch.randint(61, (sequences, capacity), generator=torch.Generator().manual_seed(1))
    layout, context, worst = executor.layout, 0, 0.0
    while context < capacity:
        fresh = given_tokens[:, context : context + layout.length].reshape(-1)
        routing = routing_of(kind, len(fresh), step=context)
        forced = executor.forced(routing, layout) if routing else None
        output = executor.step(fresh[layout.own], layout, context, forced=forced)
        logits = gather_rows(output.logits, layout.last_counts)
        hidden = reference.forward_hidden(source.embedding()[fresh], routing)[layout.length - 1 :: layout.length]
        wanted = head(hidden, source.final_norm(), plan.model.norm_eps, source.head())
        if rank == 0:
            worst = max(worst, ((logits - wanted).abs().max() / wanted.abs().max()).item())
        context += layout.length
        layout = executor.layout.decode()
    return worst


def on_rank(rank: Rank, job: dict) -> dict[str, float]:
    found = {}
    for name, plan in (plans(rank.world, job["folder"]) | coherent_plans(rank.world)).items():
        for kind in ("own", *FORCED):
            found[f"{name}: {kind}"] = worst_error(plan, kind, rank.rank)
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
def errors(tmp_path_factory) -> dict[int, dict[str, float]]:
    """By number of ranks; one rank needs no process of its own."""
    job = {"folder": str(tmp_path_factory.mktemp("disk"))}
    entry = "moeplan.tests.test_identity:on_rank"
    found = {world: LocalLauncher(world, threads=1).run(entry, job, timeout=180)[0] for world in (2, 4)}
    with one_rank():
        return found | {1: on_rank(Rank(0, 1, ("here",), torch.device("cpu"), 1, 1.0, lambda event: None), job)}


@pytest.mark.parametrize("kind", ["own", *FORCED])
@pytest.mark.parametrize(
    ("world", "name"), [(w, name) for w in (1, 2, 4) for name in (*plans(w, "."), *coherent_plans(w))]
)
def test_every_strategy_equals_the_reference(errors, world, name, kind):
    assert errors[world][f"{name}: {kind}"] < TOLERANCE


def test_the_routers_choose_identity_experts_in_these_cases():
    """The cases above with the routers' own choices have tokens of every kind."""
    made = model()
    source = RandomWeights(made, torch.float32, 5)
    x = source.embedding()[torch.arange(61)]
    chosen = routed(x, source.router(0), made.layers[0].moe)
    none = (chosen.ids < 0).sum(1)
    assert {0, 1, 2} <= set(none.tolist())
    assert ((chosen.identity > 0) == (none > 0)).all()


@pytest.mark.parametrize("score", ["softmax", "softmax_topk", "sigmoid", "noisy_topk", "cosine"])
@given(st.integers(0, 2**16), st.integers(0, 40), st.booleans())
def test_what_is_told_apart_is_all_that_was_chosen(score, seed, tokens, forced):
    """Real choices as they were, the others' weights in one sum, nothing lost; whatever the gate, forced or not."""
    gate = Gate(score=score, rank=8 if score == "cosine" else None, correction_bias=True)
    made = model(gate=gate)
    weights, moe = RandomWeights(made, torch.float32, seed).router(0), made.layers[0].moe
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
    choice = None
    if forced:
        routing = routing_of("random", tokens, step=seed)
        choice = torch.from_numpy(routing.expert_ids[:, 0]).long(), torch.from_numpy(routing.expert_weights[:, 0])
    normed, ids, gates = route(x, weights, moe, choice)
    found = routed(x, weights, moe, choice)
    real = (ids >= 0) & (ids < EXPERTS)
    assert torch.equal(found.ids[real], ids[real])
    assert torch.equal(found.weights[real], gates[real])
    assert (found.ids[~real] == -1).all()
    assert (found.weights[~real] == 0).all()
    torch.testing.assert_close(found.identity + found.weights.sum(1), gates.sum(1))
    residual = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    by_hand = residual.clone()
    for t, k in (~real).nonzero().tolist():
        by_hand[t] += gates[t, k] * normed[t]
    torch.testing.assert_close(found.onto(residual), by_hand, rtol=1e-5, atol=1e-5)


def test_without_identity_experts_nothing_is_added():
    made = model(zero_experts=0)
    weights = RandomWeights(made, torch.float32, 5).router(0)
    x = torch.randn(7, HIDDEN)
    found = routed(x, weights, made.layers[0].moe)
    assert found.identity is None
    assert found.onto(x) is x


def test_one_layer_is_that_of_longcat_flash():
    """Transformers' own module: its router chooses, its experts compute, its identity experts pass the token on."""
    from transformers.models.longcat_flash import modeling_longcat_flash as longcat  # seconds, which ranks do without

    config = longcat.LongcatFlashConfig(
        hidden_size=HIDDEN, expert_ffn_hidden_size=FFN, n_routed_experts=EXPERTS, zero_expert_num=ZERO, moe_topk=TOP_K,
        routed_scaling_factor=2.5,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = longcat.LongcatFlashMoE(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
        theirs.router.e_score_correction_bias.normal_(std=0.02)
    router = RouterWeights(
        1e-6, torch.ones(HIDDEN), theirs.router.classifier.weight, None, theirs.router.e_score_correction_bias
    )
    x = torch.randn(50, HIDDEN)
    with torch.no_grad():
        chosen = routed(x, router, MOE)
        gate_up = theirs.experts.gate_up_proj[:EXPERTS].unflatten(1, (2, FFN)).contiguous()
        y = expert_ffn(chosen.normed, gate_up, theirs.experts.down_proj, chosen.ids, chosen.weights, activation="silu")
        got, wanted = chosen.onto(y), theirs(chosen.normed)
    assert 0 < (chosen.ids < 0).float().mean() < 1
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_reference_is_the_definition():
    """One layer without attention, written out token by token and choice by choice."""
    made = Model(name="one", family="test", vocab_size=0, blocks=(Block(hidden_size=HIDDEN, moe=MOE),), dtype="f32")
    source = RandomWeights(made, torch.float32, 3)
    layer = source.layer(0)
    x = torch.randn(12, HIDDEN, generator=torch.Generator().manual_seed(0))
    wanted = x.clone()
    for t in range(len(x)):
        n = x[t] / torch.sqrt((x[t] ** 2).mean() + made.norm_eps) * layer.router.norm
        scores = (layer.router.weight @ n).softmax(0)
        for e in (scores + layer.router.correction_bias).argsort(descending=True)[:TOP_K].tolist():
            if e >= EXPERTS:
                wanted[t] += 2.5 * scores[e] * n
                continue
            gate, up = layer.gate_up[e] @ n
            wanted[t] += 2.5 * scores[e] * (layer.down[e] @ (torch.nn.functional.silu(gate) * up))
    reference = ReferenceModel(made, source, sequences=12, capacity=1)
    torch.testing.assert_close(reference.forward_hidden(x), wanted, rtol=1e-4, atol=1e-5)

"""Layers whose experts run beside the backbone: the reference by its definition, and every rank count against it."""

import numpy as np
import pytest
import torch

from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.runtime.attention import Batch, RotaryEmbedding, attention
from moeplan.runtime.check import gather_rows
from moeplan.runtime.dense import dense
from moeplan.runtime.executor import Executor
from moeplan.runtime.kernels import expert_ffn
from moeplan.runtime.launch import LocalLauncher, Rank
from moeplan.runtime.random_weights import RandomWeights
from moeplan.runtime.reference import ReferenceModel
from moeplan.runtime.router import route
from moeplan.spec import Model, Plan, Workload
from moeplan.spec.errors import MoeplanError
from moeplan.spec.offload import Offload
from moeplan.spec.plan import LayerPlan
from moeplan.spec.shortcut import WINDOWS
from moeplan.tests.plans import even_slots, hand_made_plan, made_up_foresight
from moeplan.tests.synthetic import cluster, shortcut_model, tiny_model

PROMPT, DECODE, SEQUENCES = 5, 8, 3
MODELS = {
    "output": shortcut_model("output", shared=32),
    "mid": shortcut_model("mid", beside=True),
    "input": shortcut_model("input"),
    "none": tiny_model(layers=2, shared=32),
}
COPIES = {
    1: (tuple(range(8)),),
    2: ((0, 1, 2, 3, 7), (3, 0, 7, 4, 5, 6)),
    4: ((0, 1, 2), (2, 0, 3, 4), (), (5, 6, 7, 0)),
}
WAYS = ("ep", "lists", "foreseen")  # of running the experts; the last two with some on a disk
PLACES = {1: (2,), 2: (1, 3), 4: (2, 1, 0, 4)}  # for experts that are read from a disk
HELD = {1: (3,), 2: (2, 1), 4: (1, 0, 1, 1)}  # sequences of each device


def tokens() -> torch.Tensor:
    return torch.randint(256, (SEQUENCES, PROMPT + DECODE), generator=torch.Generator().manual_seed(5))


def wanted(model: Model) -> torch.Tensor:
    """[1 + DECODE, sequences, V] logits of the single process."""
    reference = ReferenceModel(
        model, RandomWeights(model, torch.float32, 11), sequences=SEQUENCES, capacity=PROMPT + DECODE
    )
    given = tokens()
    found = [reference.prefill(given[:, :PROMPT])[:, -1]]
    found += [reference.decode(given[:, i]) for i in range(PROMPT, PROMPT + DECODE)]
    return torch.stack(found)


def on_rank(rank: Rank, job: dict) -> dict[str, float]:
    """Relative error of every model, slot and number of chunks, on rank 0; and with experts on a disk."""
    found = {}
    for name, model in MODELS.items():
        reference = wanted(model) if rank.rank == 0 else None
        for slot in range(len(WINDOWS[name]) + 1):
            for way in WAYS:
                got = logits_of(plan_of(model, rank.world, slot, way, job["folder"]), rank.rank)
                if reference is not None:
                    error = (got - reference).abs().max() / reference.abs().max()
                    found[f"{name}, slot {slot}, {way}"] = error.item()
            rank.emit({"model": name, "slot": slot})
    return found


def plan_of(model: Model, world: int, slot: int, way: str, folder: str) -> Plan:
    """A way of ``WAYS``: in memory, or partly on a disk."""
    ep = (
        LayerPlan(strategy="ep", slots=even_slots(8, world), slot=slot, chunks=1 + slot % 3),
        LayerPlan(strategy="ep", slots=COPIES[world], slot=slot),
    )
    layers = ep if way == "ep" else beyond(world, slot, way)
    foresight = made_up_foresight(layers, 8) if way == "foreseen" else None
    offload = Offload(folder=folder, places=PLACES[world], foresight=foresight) if way != "ep" else None
    workload = Workload(phase="prefill", tokens=SEQUENCES * PROMPT, sequences=SEQUENCES)
    return hand_made_plan(model, workload, layers, tokens=[PROMPT * n for n in HELD[world]], offload=offload)


def beyond(world: int, slot: int, way: str) -> tuple[LayerPlan, ...]:
    """Two layers of which each device has one expert in memory, and all of the third."""
    found = []
    for early in (2, 0 if way == "foreseen" else 9):
        resident = tuple(held if g == 2 else held[:1] for g, held in enumerate(COPIES[world]))
        ahead = tuple(() if g == 2 else held[1 : 1 + early] for g, held in enumerate(COPIES[world]))
        found.append(LayerPlan(strategy="offload", slots=COPIES[world], resident=resident, ahead=ahead, slot=slot))
    return tuple(found)


def logits_of(plan: Plan, rank: int) -> torch.Tensor:
    source = RandomWeights(plan.model, torch.float32, 11)
    executor = Executor(plan, rank, source, device=torch.device("cpu"), capacity=PROMPT + DECODE)
    layout, found = executor.layout, []
    for context in (0, *range(PROMPT, PROMPT + DECODE)):
        fresh = tokens()[:, context : context + layout.length].reshape(-1)
        output = executor.step(fresh[layout.own], layout, context)
        found.append(gather_rows(output.logits, layout.last_counts))
        layout = executor.layout.decode()
    return torch.stack(found)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_slot_equals_the_reference(world, tmp_path):
    job = {"folder": str(tmp_path)}
    errors = LocalLauncher(world, threads=1).run("moeplan.tests.test_shortcut:on_rank", job, timeout=120)[0]
    assert len(errors) == len(WAYS) * sum(len(WINDOWS[name]) + 1 for name in MODELS)
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("shortcut", ["output", "mid", "input"])
def test_the_reference_is_the_definition(shortcut):
    """Written out for one pair of layers, with plain functions."""
    model = shortcut_model(shortcut, layers=1, shared=0, beside=shortcut == "mid")
    source = RandomWeights(model, torch.float32, 3)
    first, second = source.layer(0), source.layer(1)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    batch, rope = Batch(2, 3), RotaryEmbedding(model.rope_theta) if model.rope_theta else None
    middle = x + attention(x, first.attention, None, rope, batch)
    output = middle + dense(middle, first.dense)
    read = {"output": output, "mid": middle, "input": x}[shortcut]
    normed, ids, gates = route(read, second.router, model.layers[1].moe)
    y = expert_ffn(normed, second.gate_up, second.down, ids, gates, activation="silu", implementation="reference")
    after = output + attention(output, second.attention, None, rope, batch)
    after = after + dense(after, second.dense) if second.dense is not None else after
    reference = ReferenceModel(model, source, sequences=2, capacity=3)
    torch.testing.assert_close(reference.forward_hidden(x), after + y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shortcut", ["output", "mid", "input"])
def test_the_planner_hides_what_travels(shortcut):
    """No slot or number of chunks is predicted faster than the chosen one, and some hide what the first does not."""
    model = shortcut_model(shortcut, shared=512)
    machines = cluster(model, ((1.0, 1.0), (1.0, 1.0)), uplink=2e8, local=2e8, busy=0.0)
    workload = Workload.from_text("prefill:512@32")
    plan = solve(model, machines, workload)
    step = Step.of(plan, machines)
    assert step.seconds(list(plan.layers)) == pytest.approx(plan.solver.objective)
    tried = {}
    for slot in range(len(WINDOWS[shortcut]) + 1):
        for chunks in (1, 2, 4, 8):
            layers = [p.model_copy(update={"slot": slot, "chunks": chunks}) for p in plan.layers]
            tried[slot, chunks] = step.seconds(layers)
    assert plan.solver.objective <= min(tried.values()) * (1 + 1e-9)
    assert min(tried.values()) < 0.98 * tried[0, 1]
    assert plan.solver.bound <= plan.solver.objective


def test_memory_counts_the_backbone_beside_the_experts():
    plain, beside = (shortcut_model(s, layers=1) for s in ("none", "output"))
    plans = [LayerPlan(strategy="ep", slots=even_slots(8, 2))]
    needs = []
    for model in (plain, beside):
        machines = cluster(model, ((1.0, 1.0),))
        plan = solve(model, machines, Workload.from_text("prefill:256@32"))
        step = Step.of(plan, machines)
        needs.append(np.array([m.activations for m in step.memory(plans, 2, [1 << 30] * 2)]))
    assert (needs[1] > needs[0]).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slot": 3}, "slot: 3, expected 0 to 2"),
        ({"strategy": "gathered"}, "strategy: gathered; layers with a shortcut run as ep"),
        ({"chunks": 65}, "chunks"),
        ({"strategy": "gathered", "chunks": 2}, "chunks belong to ep, hierarchical, sharded, not gathered"),
    ],
)
def test_a_plan_that_asks_for_what_the_layer_cannot_do(changes, said):
    layer = {"strategy": "ep", "slots": even_slots(8, 2)} | changes
    with pytest.raises(ValueError, match=said):
        hand_made_plan(MODELS["output"], "prefill:8@4", [LayerPlan(**layer)], tokens=(4, 4))


def test_a_model_without_what_the_shortcut_reads_is_refused():
    block = MODELS["mid"].blocks[1]
    with pytest.raises(MoeplanError, match="layer 0: the runtime does not execute a shortcut from a preceding layer"):
        RandomWeights(MODELS["mid"].model_copy(update={"blocks": (block,)}), torch.float32)
    plain = tiny_model(layers=1).blocks[0]
    with pytest.raises(MoeplanError, match=r"layer 1: .* a shortcut from inside a layer that has experts itself"):
        RandomWeights(MODELS["mid"].model_copy(update={"blocks": (plain, block)}), torch.float32)
    model, workload = MODELS["output"], Workload.from_text("prefill:256@32")
    with pytest.raises(MoeplanError, match="strategy sharded: shortcut-output has layers with a shortcut"):
        solve(model, cluster(model), workload, strategy="sharded")


@pytest.mark.parametrize("shortcut", ["output", "mid", "input"])
def test_experts_are_read_beside_the_backbone(shortcut):
    """The planner knows that a late slot gives the disk time; ``solve`` finds the slot that is predicted fastest."""
    model = shortcut_model(shortcut, shared=4096)
    machines, workload = cluster(model, ((1.0, 1.0),), disk=2e8), Workload.from_text("decode:4@64")
    whole = solve(model, machines, workload, strategy="offload")
    limit = max(m.total for m in whole.predicted.memory) - 6 * 3 * 64 * 128 * 4  # six experts of a device
    plan = solve(model, machines, workload, memory_bytes=limit)
    assert {layer.strategy for layer in plan.layers} == {"offload"}
    assert all(m.total <= m.limit for m in plan.predicted.memory)
    assert plan.predicted.reads.needed
    assert plan.solver.bound <= plan.solver.objective
    step, last = Step.of(plan, machines), len(WINDOWS[shortcut])
    assert max(step.timeline(list(plan.layers)).end) == pytest.approx(plan.solver.objective)
    ways = [[p.model_copy(update={"slot": slot}) for p in plan.layers] for slot in range(last + 1)]
    assert plan.solver.objective <= min(map(step.seconds, ways)) * (1 + 1e-9)
    waits = []
    for slot in (0, last):
        layers = [p.model_copy(update={"slot": slot, "ahead": ((),) * len(p.slots)}) for p in plan.layers]
        predicted = step.predict(layers, len(model.layers), [limit] * 2)
        waits.append((predicted.step_seconds, sum(layer.parts.get("gather", 0.0) for layer in predicted.layers)))
    (soon, waited_soon), (late, waited_late) = waits
    assert late < 0.95 * soon
    assert waited_late < 0.9 * waited_soon

"""Each strategy against the plain expert FFN of one process, on easy and hostile routings."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.layout import Layout as PlannedLayout
from moeplan.planner.strategies.layer import Layer
from moeplan.runtime.groups import open_levels
from moeplan.runtime.kernels import expert_ffn
from moeplan.runtime.launch import LocalLauncher
from moeplan.runtime.layout import Layout
from moeplan.runtime.strategies import LayerContext, Region, ep, sharded, strategy_of
from moeplan.runtime.strategies.resting import Resting
from moeplan.runtime.strategies.rows import unpack
from moeplan.spec import Model
from moeplan.spec.layout import even
from moeplan.spec.model import Block, Moe
from moeplan.spec.offload import Offload
from moeplan.spec.operators import row_bytes
from moeplan.spec.plan import LayerPlan
from moeplan.spec.workload import Workload
from moeplan.tests.plans import hand_made_plan

WORLD, HIDDEN, EXPERTS, TOP_K, FFN = 4, 16, 8, 3, 12
MOE = Moe(num_experts=EXPERTS, top_k=TOP_K, ffn_size=FFN)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

EVEN = ((0, 1), (2, 3), (4, 5), (6, 7))
UNEVEN = ((5,), (0, 7, 3, 1), (), (6, 2, 4))  # one device without experts, any order
COPIES = ((0, 1, 2, 3), (3, 0, 7, 4), (0, 5, 6), (2,))
SHARES = ((0.2, 1.0, 0.5, 0.9), (0.1, 0.3, 1.0, 1.0), (0.5, 1.0, 1.0), (0.5,))
PLANS = {
    "ep": LayerPlan(strategy="ep", slots=EVEN),
    "ep uneven": LayerPlan(strategy="ep", slots=UNEVEN),
    "ep copies": LayerPlan(strategy="ep", slots=COPIES),
    "ep shares": LayerPlan(strategy="ep", slots=COPIES, shares=SHARES),
    "ep 2 chunks": LayerPlan(strategy="ep", slots=EVEN, chunks=2),
    "ep shares, 5 chunks": LayerPlan(strategy="ep", slots=COPIES, shares=SHARES, chunks=5),
    "ep uneven, 8 chunks": LayerPlan(strategy="ep", slots=UNEVEN, chunks=8),
    "ep by batch": LayerPlan(strategy="ep", slots=COPIES, speeds=(1.0, 0.5, 2.0, 1.0)),
    "ep by batch, 2 chunks": LayerPlan(strategy="ep", slots=COPIES, speeds=(1.0, 0.5, 2.0, 1.0), chunks=2),
    "offload": LayerPlan(
        strategy="offload", slots=COPIES, resident=((0, 2), (), (0, 5, 6), ()), ahead=((3,), (4, 7), (), ())
    ),
    "offload shares": LayerPlan(
        strategy="offload",
        slots=COPIES,
        shares=SHARES,
        resident=((1,), (3, 0), (6,), (2,)),
        ahead=((3,), (), (0, 5), ()),
    ),
    "offload, few rows by the host": LayerPlan(
        strategy="offload",
        slots=COPIES,
        resident=((0, 2), (), (0, 5, 6), ()),
        ahead=((3,), (4, 7), (), ()),
        host_rows=(2, 3, 0, 5),
    ),
    "offload, all by the host": LayerPlan(
        strategy="offload",
        slots=COPIES,
        shares=SHARES,
        resident=((),) * 4,
        ahead=((),) * 4,
        host_rows=(10**6,) * 4,
    ),
    "hierarchical": LayerPlan(strategy="hierarchical", slots=EVEN),
    "hierarchical uneven": LayerPlan(strategy="hierarchical", slots=UNEVEN),
    "hierarchical copies": LayerPlan(strategy="hierarchical", slots=COPIES),
    "hierarchical shares": LayerPlan(strategy="hierarchical", slots=COPIES, shares=SHARES),
    "hierarchical 2 chunks": LayerPlan(strategy="hierarchical", slots=EVEN, chunks=2),
    "hierarchical shares, 5 chunks": LayerPlan(strategy="hierarchical", slots=COPIES, shares=SHARES, chunks=5),
    "hierarchical uneven, 8 chunks": LayerPlan(strategy="hierarchical", slots=UNEVEN, chunks=8),
    "sharded": LayerPlan(strategy="sharded", slots=((),) * 4, split=(3, 3, 3, 3)),
    "sharded uneven": LayerPlan(strategy="sharded", slots=((),) * 4, split=(1, 7, 0, 4)),
    "sharded 2 chunks": LayerPlan(strategy="sharded", slots=((),) * 4, split=(3, 3, 3, 3), chunks=2),
    "sharded uneven, 8 chunks": LayerPlan(strategy="sharded", slots=((),) * 4, split=(1, 7, 0, 4), chunks=8),
    "gathered": LayerPlan(strategy="gathered", slots=EVEN),
    "gathered uneven": LayerPlan(strategy="gathered", slots=UNEVEN),
    "gathered copies": LayerPlan(strategy="gathered", slots=COPIES),
}
PLACES = (1, 2, 1, 1)  # for experts that are read from a disk
HOSTS = [0, 0, 1, 1]
OTHER_HOSTS = {"one host": [0] * 4, "a host each": [0, 1, 2, 3], "three and one": [0, 0, 0, 1], "apart": [0, 1, 1, 0]}
PLACED = {name: (plan, HOSTS) for name, plan in PLANS.items()}
PLACED |= {
    f"hierarchical, {where}": (PLANS["hierarchical shares" if "one" in where else "hierarchical copies"], hosts)
    for where, hosts in OTHER_HOSTS.items()
}
PLACED |= {
    f"hierarchical 3 chunks, {where}": (
        LayerPlan(strategy="hierarchical", slots=COPIES, shares=SHARES if "one" in where else None, chunks=3),
        hosts,
    )
    for where, hosts in OTHER_HOSTS.items()
}
TOKENS = {
    "even": (5, 5, 5, 5),
    "uneven": (1, 9, 3, 40),
    "idle rank": (0, 7, 0, 6),
    "one token": (0, 0, 1, 0),
    "none": (0,) * 4,
}
CASES = [("uneven", r) for r in ("random", "skewed", "one device", "idle experts", "some of none", "all of none")]
CASES += [(split, "random") for split in TOKENS if split != "uneven"]


def layer_weights(dtype: torch.dtype, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(layer)
    gate_up = torch.randn(EXPERTS, 2, FFN, HIDDEN, generator=g) / HIDDEN**0.5
    return gate_up.to(dtype), (torch.randn(EXPERTS, HIDDEN, FFN, generator=g) / FFN**0.5).to(dtype)


def routed(routing: str, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, residual [T, D], ids [T, K], gate weights [T, K] of all devices' tokens."""
    g = torch.Generator().manual_seed(tokens)
    popularity = {
        "random": torch.ones(EXPERTS),
        "skewed": 4.0 ** -torch.arange(EXPERTS),
        "one device": torch.tensor([1.0, 1e-9, 1e-9, 1.0, 1e-9, 1e-9, 1e-9, 1.0]),
        "idle experts": torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]),
    }.get(routing, torch.ones(EXPERTS))
    ids = torch.multinomial(popularity.expand(max(tokens, 1), -1), TOP_K, generator=g)[:tokens]
    weights = torch.rand(tokens, TOP_K, generator=g)
    if routing.endswith("of none"):  # choices of identity experts, as strategies get them
        none = torch.rand(tokens, TOP_K, generator=g) < (0.5 if routing.startswith("some") else 2.0)
        none[::4] = True
        ids, weights = ids.masked_fill(none, -1), weights.masked_fill(none, 0.0)
    x, residual = (torch.randn(tokens, HIDDEN, generator=g).to(dtype) for _ in range(2))
    return x, residual, ids, weights


def on_rank(rank, job) -> dict[str, float]:
    """Largest error of each case on this rank, relative to the largest wanted value."""
    found = {}
    levels = {tuple(hosts): open_levels(hosts) for hosts in (HOSTS, *OTHER_HOSTS.values())}
    for dtype, (name, (plan, hosts)) in itertools.product(TOLERANCE, PLACED.items()):
        region = Region(dtype, rank.device)
        folder = job["folder"] if plan.host_rows is None else ""  # the memory of the host
        resting = resting_of(plan, rank, dtype, folder) if plan.strategy == "offload" else None
        context = LayerContext(rank.rank, hosts, MOE, HIDDEN, rank.device, region, levels[tuple(hosts)], 0, resting)
        layers = [strategy_of(plan, context._replace(ordinal=i)) for i in range(2)]
        for i, strategy in enumerate(layers):
            experts, (first, last), outside = strategy.stored
            for expert in outside:
                resting.put(i, expert, *(w[expert] for w in layer_weights(dtype, i)))
            gate_up, down = (w[list(experts)] for w in layer_weights(dtype, i))
            strategy.prepare(gate_up[:, :, first:last].contiguous(), down[:, :, first:last].contiguous())
        for split, routing in CASES:
            found[f"{name} / {split} / {routing} / {dtype}"] = worst_error(
                rank.rank, layers, resting, name, TOKENS[split], routing, dtype
            )
        rank.emit({"strategy": name})
    return found


def resting_of(plan: LayerPlan, rank, dtype: torch.dtype, folder: str) -> Resting:
    """Of two layers with this plan."""
    model = Model(
        name="two", family="test", vocab_size=0, blocks=(Block(count=2, hidden_size=HIDDEN, moe=MOE),), dtype="f32"
    )
    offload = Offload(folder=folder, places=PLACES)
    whole = hand_made_plan(model, "decode:4@1", [plan], tokens=(1,) * WORLD, offload=offload)
    return Resting(whole, rank.rank, dtype, rank.device)


def worst_error(
    me: int,
    layers: list,
    resting: Resting | None,
    name: str,
    tokens: tuple[int, ...],
    routing: str,
    dtype: torch.dtype,
) -> float:
    worst = 0.0
    layout = Layout(me, 1, tokens, tokens, 1)
    x, residual, ids, weights = routed(routing, sum(tokens), dtype)
    if resting is not None:
        resting.begin()
    for i, strategy in enumerate(layers):
        parts: list[str] = []
        strategy.start()
        got = strategy.forward(*(t[layout.own] for t in (x, ids, weights, residual)), layout, parts.append)
        begun = ["gather"] if "gathered" in name else ["dispatch"]
        assert [p for p in dict.fromkeys(parts) if "offload" not in name or p != "gather"] == [
            *begun,
            "expert",
            "combine",
        ]
        y = expert_ffn(x, *layer_weights(dtype, i), ids, weights, activation="silu", implementation="reference")
        wanted = (residual.float() + y.float())[layout.own]
        assert (got.dtype, got.shape) == (dtype, wanted.shape)
        if len(wanted):
            worst = max(worst, ((got.float() - wanted).abs().max() / wanted.abs().max()).item())
    return worst


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, float]]:
    job = {"folder": str(tmp_path_factory.mktemp("disk"))}
    return LocalLauncher(WORLD).run("moeplan.tests.test_strategies:on_rank", job, timeout=60)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", list(PLACED))
def test_equals_single_process(found, name, dtype):
    cases = {f"{name} / {split} / {routing} / {dtype}" for split, routing in CASES}
    worst = {case: max(f[case] for f in found) for case in cases}
    assert max(worst.values()) < TOLERANCE[dtype], {c: e for c, e in worst.items() if e >= TOLERANCE[dtype]}


IDENTITY = (0, 0, 4, 100)  # identity experts beside the others; 100: hardly a choice is of any other


def chosen(rng: np.random.Generator, tokens: int, identity: int) -> np.ndarray:
    """[tokens, TOP_K] experts, -1 for identity ones."""
    ids = rng.random((tokens, EXPERTS + identity)).argsort(1)[:, :TOP_K]
    return np.where(ids < EXPERTS, ids, -1)


@st.composite
def placements(draw):
    """Slots of up to 4 devices, every expert at least once, some replicated, some devices possibly empty."""
    devices = draw(st.integers(1, 4))
    holders = draw(st.lists(st.sets(st.integers(0, devices - 1), min_size=1), min_size=EXPERTS, max_size=EXPERTS))
    slots = [[e for e in range(EXPERTS) if g in holders[e]] for g in range(devices)]
    return tuple(tuple(draw(st.permutations(experts))) for experts in slots)


@settings(max_examples=20, deadline=None)
@given(
    placements(), st.lists(st.integers(0, 6), min_size=4, max_size=4), st.integers(0, 2**30), st.sampled_from(IDENTITY)
)
def test_ep_pack_and_combine(slots, counts, seed, identity):
    """Rows are the distinct (token, destination) pairs; what the destinations return adds up to the layer."""
    devices, counts = len(slots), counts[: len(slots)]
    plan = LayerPlan(strategy="ep", slots=slots)
    g = torch.Generator().manual_seed(seed)
    total = sum(counts)
    x, residual = torch.randn(2, total, HIDDEN, generator=g).unbind()
    ids = torch.from_numpy(chosen(np.random.default_rng(seed), total, identity))
    weights = torch.rand(total, TOP_K, generator=g)
    gate_up, down = layer_weights(torch.float32)
    outputs = []
    for rank, own in enumerate(Layout(r, 1, tuple(counts), tuple(counts), 1).own for r in range(devices)):
        table = ep.serving(plan, [0] * devices, EXPERTS, rank, x.device)
        phase = ep.phases(own.start, own.stop - own.start, x.device)
        rows, token, sent = ep.pack(x[own], ids[own], weights[own], table, phase)
        assert rows.shape == (len(token), row_bytes(Block(hidden_size=HIDDEN, moe=MOE), 4))
        serving_device = table.device[ids[own]] if table.device.dim() == 1 else table.device[ids[own], phase]
        served = [serving_device[t][ids[own][t] >= 0].tolist() for t in range(counts[rank])]
        pairs = [(d, t) for d in range(devices) for t in range(counts[rank]) if d in served[t]]
        assert token.tolist() == [t for _, t in pairs]
        assert sent.tolist() == [sum(d == device for d, _ in pairs) for device in range(devices)]
        returned = []
        for experts, chunk in zip(slots, rows.split(sent.tolist()), strict=True):
            held = list(experts)
            here = unpack(chunk, HIDDEN, torch.float32, TOP_K)
            assert all(len(set(r[r >= 0].tolist())) == (r >= 0).sum() for r in here[1])
            returned.append(expert_ffn(here[0], gate_up[held], down[held], *here[1:], activation="silu"))
        outputs.append(ep.combine(torch.cat(returned), token, residual[own]))
    wanted = residual + expert_ffn(x, gate_up, down, ids, weights, activation="silu", implementation="reference")
    torch.testing.assert_close(torch.cat(outputs), wanted, rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    placements(),
    st.lists(st.integers(0, 300), min_size=4, max_size=4),
    st.integers(0, 2**30),
    st.booleans(),
    st.sampled_from([1, 1, 2, 5]),
    st.sampled_from(IDENTITY),
)
def test_what_is_sent_is_what_the_planner_counts(slots, tokens, seed, shared, chunks, identity):
    """Rows between all devices, and rows of every expert on every device; copies, uneven shares, chunks included."""
    devices, tokens = len(slots), tuple(tokens[: len(slots)])
    rng = np.random.default_rng(seed)
    shares = None
    if shared:
        weight = rng.uniform(0.01, 1.0, (devices, EXPERTS))
        held = np.array([[e in experts for e in range(EXPERTS)] for experts in slots])
        taken = weight * held / (weight * held).sum(0)
        shares = tuple(tuple(float(taken[g, e]) for e in experts) for g, experts in enumerate(slots))
    plan = LayerPlan(strategy="ep", slots=slots, shares=shares)
    hosts = [0] * devices if seed % 2 else [g * 2 // devices for g in range(devices)]
    ids = chosen(rng, sum(tokens), identity)
    workload = Workload(phase="prefill", tokens=max(sum(tokens), 1), sequences=max(sum(tokens), 1))
    costs = SimpleNamespace(cluster=SimpleNamespace(host_index=np.array(hosts)), element_bytes=4)
    block = Block(hidden_size=HIDDEN, moe=MOE)
    layer = Layer.of(costs, block, PlannedLayout(workload, 1, tokens, tokens), ids[None])
    for c, part in enumerate(layer.chunks(chunks)):
        dispatch = part.choices.dispatch([plan])
        rows = dispatch.rows.sizes(0) + np.diag(dispatch.kept[0])
        counts = dispatch.experts.counts[0, dispatch.experts.of]
        computed = np.zeros((devices, EXPERTS), int)
        for rank in range(devices):
            own = Layout(rank, 1, tokens, tokens, 1).own
            table = ep.serving(plan, hosts, EXPERTS, rank, torch.device("cpu"))
            phase = ep.phases(own.start, own.stop - own.start, torch.device("cpu"))
            chunk = even(tokens[rank], chunks)
            x = torch.ones(own.stop - own.start, HIDDEN).split(chunk)[c]
            mine = torch.from_numpy(ids[own]).split(chunk)[c]
            packed, _, sent = ep.pack(x, mine, torch.ones(mine.shape), table, phase.split(chunk)[c])
            assert sent.tolist() == rows[rank].tolist()
            for g, message in enumerate(packed.split(sent.tolist())):
                _, here, _ = unpack(message, HIDDEN, torch.float32, TOP_K)
                served = np.bincount(here[here >= 0].numpy(), minlength=len(slots[g]))
                computed[g, list(slots[g])] += served[: len(slots[g])]
        assert (computed == counts).all()


def test_a_copy_on_the_own_device_serves_without_shares():
    table = ep.serving(LayerPlan(strategy="ep", slots=COPIES), [0, 0, 1, 1], EXPERTS, 1, torch.device("cpu"))
    assert all((table.device[e] == 1).all() for e in COPIES[1])
    assert (table.device[-1] == 4).all()
    assert (table.slot[-1] == -1).all()
    assert all((table.slot[e] == COPIES[1].index(e)).all() for e in COPIES[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_rows_keep_every_bit(dtype):
    x, residual, ids, weights = routed("random", 11, dtype)
    rows = sharded.pack(x, ids, weights)
    got = sharded.unpack(rows, HIDDEN, dtype, TOP_K)
    assert all(torch.equal(a, b) for a, b in zip(got, (x, ids.int(), weights), strict=True))
    partials = torch.stack([x, x, -x])
    torch.testing.assert_close(sharded.combine(partials, residual), (x.float() + residual.float()).to(dtype))


def test_gathered_rests_every_expert_once():
    resting = LayerPlan(strategy="gathered", slots=COPIES).resting()
    assert resting == [[0, 1, 2, 3], [7, 4], [5, 6], []]
    assert sorted(np.concatenate(resting)) == list(range(EXPERTS))


def test_region_is_as_large_as_the_largest_layer_and_shared():
    region = Region(torch.float32, torch.device("cpu"))
    region.reserve((2, 3), (4,))
    region.reserve((5, 5))
    small, large = region.views((2, 3), (4,)), region.views((5, 5))
    assert [list(v.shape) for v in (*small, *large)] == [[2, 3], [4], [5, 5]]
    assert small[0].data_ptr() == large[0].data_ptr()
    assert small[0].untyped_storage().nbytes() == 25 * 4

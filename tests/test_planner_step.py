"""A step's prediction against hand calculation, and its lower bounds and memory against their definitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.columns import Column
from moeplan.planner.costs import Costs
from moeplan.planner.layout import Layout
from moeplan.planner.options import Classes
from moeplan.planner.step import Step, check_supported
from moeplan.planner.tables import Tables, beside
from moeplan.planner.traffic import Traffic
from moeplan.runtime.layout import Layout as RuntimeLayout
from moeplan.spec import Workload
from moeplan.spec.errors import MoeplanError
from moeplan.spec.model import Attention, Block, Dense, Gate, Moe
from moeplan.spec.operators import attention_shape, dense_shape, exchange_shape, expert_shape, row_bytes
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import COPY_PHASES, COPY_STEP, Routing, copy_table, draw_routing
from moeplan.tests.synthetic import BYTES, cluster, tiny_model

LINEAR = ((0, 1), (2, 3), (4, 5), (6, 7))
EP = LayerPlan(strategy="ep", slots=LINEAR)
SHARDED = LayerPlan(strategy="sharded", slots=((),) * 4, split=(48, 16, 64, 0))
GATHERED = LayerPlan(strategy="gathered", slots=LINEAR)
HIERARCHICAL = LayerPlan(strategy="hierarchical", slots=LINEAR)


def make_step(
    model=None, speeds=((1.0, 1.0), (1.0, 1.0)), workload="prefill:256@32", tensor=1, sequences=None, **options
):
    model = model or tiny_model(layers=3)
    load = Workload.from_text(workload)
    costs = Costs(cluster(model, speeds, **options), model, "f32")
    groups = costs.devices // tensor
    sequences = sequences or tuple(load.sequences // groups for _ in range(groups))
    return Step(costs, model, Layout.of(load, tensor, sequences), draw_routing(None, model, load, 0))


def dispatched(layer, plan):
    """Rows sent [source, target], those that stay on the diagonal, and rows that each expert computes."""
    sent = layer.choices.dispatch([plan])
    return sent.rows.sizes(0) + np.diag(sent.kept[0]), sent.experts.devices[0]


def tables(step, options):
    """The tables of a space in which every layer may use each of the options."""
    classes = Classes.of(step.model.moe_layers, len(step.model.layers))
    columns = [Column.of(step, classes, [plan] * len(classes.members)) for plan in options]
    return Tables(step, classes, columns, np.full(step.layout.devices, 1 << 50))


def reader(step):
    """Seconds of one operator straight from the document; of prompts on the parabola through its three lengths."""

    def read(device, operator, shape, **at):
        curve = step.costs.cluster.operator(device, operator, shape, "f32", "tiny")
        if operator == "attention_prefill":
            lengths = curve.axes[1].values
            seconds = [curve.at(**at | {"length": length}).seconds for length in lengths]
            return float(np.polyval(np.polyfit(lengths, seconds, 2), at["length"]))
        return curve.at(**at).seconds

    return read


def test_a_gathered_step_on_one_device_is_the_sum_of_its_operators():
    model = tiny_model(layers=2, dense=1, shared=32)
    step = make_step(model, ((1.0,),), "prefill:64@32", sequences=(2,))
    plan = LayerPlan(strategy="gathered", slots=(tuple(range(8)),))
    read, moe, dense = reader(step), model.layers[1], model.layers[0]
    attention = read(0, "attention_prefill", attention_shape(moe), sequences=2, length=32)
    expected = read(0, "embed", {"hidden": 64, "vocabulary": 256}, tokens=64)
    expected += 3 * attention + read(0, "dense_ffn", dense_shape(dense, 512, True), tokens=64)
    for j in range(2):
        counts = np.bincount(step.routing.expert_ids[:, j].ravel(), minlength=8)
        active = counts[counts > 0]
        expected += 2 * 8 * 3 * 64 * 128 * 4 / BYTES  # its own experts copied into the region
        expected += read(0, "route", {"hidden": 64, "experts": 8, "top_k": 2}, tokens=64)
        expected += np.mean(
            [read(0, "expert_ffn", expert_shape(moe), ffn=128, experts=len(active), tokens=n) for n in active]
        )
        expected += read(0, "gathered_combine", exchange_shape(moe, 1), tokens=64)
        expected += read(0, "dense_ffn", dense_shape(moe, 32, True), tokens=64)
    expected += read(0, "head", {"hidden": 64, "vocabulary": 256}, tokens=2)  # the last token of each sequence
    assert step.seconds([plan, plan]) == pytest.approx(expected)


def test_an_ep_layer_by_hand():
    """Two devices on one host, one token each, both experts of each token known: every operator and message by hand."""
    model = tiny_model(layers=1, experts=2, top_k=1)
    step = make_step(model, ((1.0, 0.5),), "decode:2@64", sequences=(1, 1))
    ids = np.array([[[1]], [[1]]])  # both tokens go to expert 1 on device 1
    step = Step(step.costs, model, step.layout, Routing(ids, np.ones(ids.shape, np.float32)))
    plan = LayerPlan(strategy="ep", slots=((0,), (1,)))
    block, read = model.layers[0], reader(step)
    shape, row = exchange_shape(block, 2), row_bytes(block, 4)

    def before(device):
        return sum(
            (
                read(device, "attention_decode", attention_shape(block), sequences=1, context=64),
                read(device, "route", {"hidden": 64, "experts": 2, "top_k": 1}, tokens=1),
                read(device, "ep_pack", shape, tokens=1),
            )
        )

    def exchange(sizes):
        return step.costs.all_to_all((0, 1), Traffic.of(np.array([sizes], float))).seconds.max()

    expected = max(before(0), before(1)) + exchange([[8, 8], [8, 8]]) + exchange([[0, row], [0, 0]])
    expected += read(1, "ep_unpack", shape, tokens=2)
    expected += read(1, "expert_ffn", expert_shape(block), ffn=128, experts=1, tokens=2)
    expected += exchange([[0, 0], [256, 0]]) + max(read(d, "ep_combine", shape, tokens=1) for d in (0, 1))
    assert step.cost(step.layer([0]), [plan]).seconds == pytest.approx([expected])


def test_a_sharded_layer_by_hand():
    step = make_step(speeds=((1.0, 0.5), (0.25, 1.0)))
    block, read = step.model.layers[0], reader(step)
    shape, group = exchange_shape(block, 4), (0, 1, 2, 3)
    counts = np.bincount(step.routing.expert_ids[:, 0].ravel(), minlength=8)

    def before(d):
        return (
            read(d, "attention_prefill", attention_shape(block), sequences=2, length=32)
            + read(d, "route", {"hidden": 64, "experts": 8, "top_k": 2}, tokens=64)
            + read(d, "sharded_pack", shape, tokens=64)
        )

    def experts(d):
        each = [read(d, "expert_ffn", expert_shape(block), ffn=SHARDED.split[d], experts=8, tokens=n) for n in counts]
        return read(d, "sharded_unpack", shape, tokens=256) + np.mean(each)

    expected = max(map(before, group))
    expected += step.costs.cluster.collective("all_gather", group).curve.at(bytes=64 * row_bytes(block, 4)).seconds
    expected += max(map(experts, group))
    expected += step.costs.cluster.collective("all_to_all", group).curve.at(bytes=64 * 256).seconds
    expected += max(read(d, "sharded_combine", shape, tokens=64) for d in group)
    assert step.cost(step.layer([0]), [SHARDED]).seconds == pytest.approx([expected])


def test_attention_divided_over_a_tensor_group_by_hand():
    step = make_step(tensor=2)
    block, read = step.model.layers[0], reader(step)
    own = 64 * 64 * 4
    gather = step.costs.cluster.collective("all_gather", (0, 1)).curve.at(bytes=own).seconds
    scatter = step.costs.cluster.collective("reduce_scatter", (0, 1)).curve.at(bytes=own).seconds
    attention = read(0, "attention_prefill", attention_shape(block, 2), sequences=4, length=32)
    parts = step.predict([EP] * 3, 3, [1 << 40] * 4).layers[1].parts
    assert parts["attention"] == pytest.approx(gather + attention + scatter)


def test_gathering_hides_behind_attention_and_costs_its_busy_time():
    """The transfer ends while attention runs: nothing is waited for, but the processors lose what it kept busy."""
    step = make_step(speeds=((0.05, 0.05), (0.05, 0.05)), uplink=4e9)
    held = 2 * 3 * 64 * 128 * 4
    exchange = step.costs.all_gather((0, 1, 2, 3), np.full((1, 4), held))
    alone = exchange.seconds[0, 0]
    lost = step.costs.demands(exchange, 0, [0])[0]["compute 0"] * (alone - exchange.latency[0])
    copy = 2 * held / (0.05 * BYTES)
    attention = reader(step)(0, "attention_prefill", attention_shape(step.model.layers[0]), sequences=2, length=32)
    assert lost > 1e-5
    assert alone < copy + attention
    parts = step.predict([GATHERED] * 3, 3, [1 << 40] * 4).layers[1].parts
    assert parts["gather"] + parts["attention"] == pytest.approx(copy + attention + lost)


def test_what_attention_does_not_hide_is_waited_for():
    step = make_step(uplink=1e7)
    alone = step.costs.all_gather((0, 1, 2, 3), np.full((1, 4), 2 * 3 * 64 * 128 * 4)).seconds.max()
    parts = step.predict([GATHERED] * 3, 3, [1 << 40] * 4).layers[1].parts
    assert alone > 10 * parts["attention"]
    assert parts["gather"] + parts["attention"] + parts["route"] == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("plan", [EP, SHARDED, GATHERED, HIERARCHICAL], ids=lambda p: p.strategy)
@pytest.mark.parametrize("sequences", [(2, 2, 2, 2), (5, 1, 0, 2)], ids=str)
def test_every_moment_of_a_step_belongs_to_a_part(plan, sequences):
    step = make_step(tiny_model(layers=3, dense=1, shared=32), ((1.0, 0.5), (0.3, 1.0)), sequences=sequences)
    prediction, timeline = step.predict([plan] * 3, 4, [1 << 40] * 4), step.timeline([plan] * 3)
    total = sum(sum(layer.parts.values()) for layer in prediction.layers)
    ends = [max(e for o, e in zip(timeline.operations, timeline.end, strict=True) if o.device == d) for d in range(4)]
    assert total == pytest.approx(np.mean(ends))
    assert timeline.makespan == max(ends)
    assert prediction.step_seconds == pytest.approx(timeline.makespan, rel=1e-12)
    assert [layer.layer for layer in prediction.layers] == [-1, 0, 1, 2, 3]
    assert "dense" in prediction.layers[1].parts


def test_an_ep_layers_rows_are_deduplicated_and_copies_follow_the_runtimes_table():
    step = make_step()
    layer, slots = step.layers[0], ((0, 1, 2, 3), (4, 5, 6, 7), (0, 1, 2, 3), (4, 5, 6, 7))
    plan = LayerPlan(strategy="ep", slots=slots)
    rows, counts = dispatched(layer, plan)
    table = copy_table(slots, None, [0, 0, 1, 1], 8)
    expected, computed = np.zeros((4, 4)), np.zeros((4, 8))
    for t, ids in enumerate(layer.choices.ids[0]):
        source = t // 64
        served = [table[source, e, (t * COPY_STEP) % COPY_PHASES] for e in ids]
        for device in set(served):
            expected[source, device] += 1
        for device, expert in zip(served, ids, strict=True):
            computed[device, expert] += 1
    assert (rows == expected).all()
    assert (counts == computed).all()
    assert rows[:2, 2:].sum() == 0  # a copy on the own host serves


@given(st.permutations(range(8)), st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_without_replicas_the_short_cut_agrees_with_the_copy_table(order, device_of):
    step = _STEP
    slots = tuple(tuple(e for e in order if device_of[e] == d) for d in range(4))
    rows, _ = dispatched(step.layers[1], LayerPlan(strategy="ep", slots=slots))
    table = copy_table(slots, None, [0, 0, 1, 1], 8)[0, :, 0]
    expected = np.zeros((4, 4))
    for t, ids in enumerate(step.layers[1].choices.ids[0]):
        for device in {int(table[e]) for e in ids}:
            expected[t // 64, device] += 1
    assert (rows == expected).all()


_STEP = make_step()


@pytest.mark.parametrize(("tensor", "sequences"), [(1, (3, 1, 0, 4)), (2, (3, 5)), (4, (8,))])
def test_layout_is_the_runtimes(tensor, sequences):
    layout = Layout.of(Workload.from_text("prefill:56@7"), tensor, sequences)
    theirs = RuntimeLayout(0, tensor, layout.tokens, sequences, 7)
    assert list(layout.last_counts) == theirs.last_counts
    assert layout.group(0) == tuple(range(tensor))
    assert sum(layout.tokens) == 56
    decode = Layout.of(Workload.from_text("decode:8"), tensor, sequences)
    assert decode.tokens == theirs.decode().tokens


@given(
    st.lists(st.sampled_from([EP, SHARDED, GATHERED, HIERARCHICAL]), min_size=3, max_size=3),
    st.sampled_from([(2, 2, 2, 2), (5, 1, 0, 2)]),
)
@settings(deadline=None, max_examples=15)
def test_the_bounds_hold_for_every_choice(plans, sequences):
    step = make_step(speeds=((1.0, 0.5), (0.3, 1.0)), sequences=sequences)
    options = [EP, SHARDED, GATHERED, HIERARCHICAL]
    space = tables(step, options)
    seconds, bound = step.seconds(plans), space.lower_bound()
    additive = beside(step) + space.arrival.min(1).sum()
    assert bound <= seconds * (1 + 1e-9)
    assert additive <= seconds * (1 + 1e-9)
    chosen = [options.index(plan) for plan in plans]
    assert space.step_seconds(chosen) == pytest.approx(seconds, rel=1e-12)
    assert seconds <= sum(space.seconds[i, o] for i, o in enumerate(chosen)) * 1.5 + 1e-3


def test_without_overlap_the_bound_of_one_choice_is_its_time():
    step = make_step(speeds=((1.0, 0.5), (0.3, 1.0)))
    for plans in itertools.product([EP, SHARDED, HIERARCHICAL], repeat=3):
        classes = Classes.of(step.model.moe_layers, 3)
        single = Tables(step, classes, [Column.of(step, classes, plans)], np.full(4, 1 << 50))
        assert single.lower_bound() == pytest.approx(step.seconds(list(plans)))


def test_memory_of_one_layer_by_hand():
    model = tiny_model(layers=3)
    step = make_step(model)
    a, expert = model.layers[0].attention, 3 * 64 * 128 * 4
    always = (2 * 64 + a.parameters(64) + 64 * 8) * 4
    outside = (2 * 256 * 64 + 64) * 4
    for plan, per_layer, region in (
        (EP, [2 * expert] * 4, 0),
        (HIERARCHICAL, [2 * expert] * 4, 0),
        (GATHERED, [2 * expert] * 4, 8 * expert),
        (SHARDED, [8 * expert * n // 128 for n in SHARDED.split], 0),
    ):
        memory = step.memory([plan] * 3, 3, [10**9] * 4)
        assert [m.weights for m in memory] == [outside + 3 * (always + own) for own in per_layer]
        assert {m.gathered for m in memory} == {region}
        assert {m.cache for m in memory} == {3 * 2 * 32 * 2 * 4 * 16 * 4}
        assert {m.limit for m in memory} == {10**9}
        stored = step.memory([plan] * 3, 1, [10**9] * 4)
        assert [m.weights for m in stored] == [outside + always + own for own in per_layer]
        assert {m.cache for m in stored} == {3 * 2 * 32 * 2 * 4 * 16 * 4}


def test_traffic_counts_what_crosses_each_link():
    step = make_step()
    rows = [dispatched(layer, EP)[0] for layer in step.layers]
    block = step.model.layers[0]
    traffic = {(t.source, t.target): t.bytes for t in step.predict([EP] * 3, 3, [1 << 40] * 4).traffic}
    assert len(traffic) == 12
    expected = sum(r[0, 1] * row_bytes(block, 4) + r[1, 0] * 256 + 8 for r in rows)
    assert traffic[0, 1] == expected


def block(**changes):
    attention = Attention(heads=4, kv_heads=4, head_dim=8)
    return Block(
        **({"hidden_size": 32, "attention": attention, "moe": Moe(num_experts=4, top_k=1, ffn_size=8)} | changes)
    )


@pytest.mark.parametrize(
    ("blocks", "named"),
    [
        ([block(), block(hidden_size=64)], "layer 1: the runtime does not execute hidden sizes that change"),
        ([block(shortcut="mid")], "layer 0: the runtime does not execute a shortcut from a preceding layer"),
        ([block(dense=Dense(ffn_size=8))], "a dense FFN beside the experts"),
        ([block(attention=Attention(kind="window", heads=4, kv_heads=4, head_dim=8))], "window attention"),
        (
            [
                block(
                    attention=Attention(
                        kind="mla", heads=4, kv_heads=4, head_dim=8, kv_lora_rank=8, rope_head_dim=4, v_head_dim=8
                    )
                )
            ],
            "mla attention",
        ),
        ([block(attention=Attention(heads=4, kv_heads=4, head_dim=8, cross=True))], "cross-attention"),
        (
            [block(moe=Moe(num_experts=4, top_k=1, ffn_size=8, zero_experts=2, gate=Gate(groups=2)))],
            "group-limited routing with identity experts",
        ),
        ([block(), block(moe=Moe(num_experts=8, top_k=1, ffn_size=8))], "unequal experts"),
    ],
)
def test_what_cannot_be_planned_is_named(blocks, named):
    model = tiny_model().model_copy(update={"blocks": tuple(blocks)})
    with pytest.raises(MoeplanError, match=named) as error:
        check_supported(model)
    assert str(error.value).startswith("tiny: ")
    assert "\n" not in str(error.value)

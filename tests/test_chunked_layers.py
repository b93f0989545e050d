"""Layers in 1, 2, 4 and 8 chunks on 1, 2 and 4 ranks: against the reference, and the bytes sent against the plan."""

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moeplan.planner.costs import Costs
from moeplan.planner.layout import Layout as PlannedLayout
from moeplan.planner.links import Links
from moeplan.planner.step import build
from moeplan.planner.strategies.layer import Layer
from moeplan.runtime.groups import open_levels
from moeplan.runtime.launch import LocalLauncher
from moeplan.runtime.strategies import LayerContext, Region, strategy_of
from moeplan.spec import Model
from moeplan.spec.chunk_order import led
from moeplan.spec.model import Block
from moeplan.spec.plan import CHUNKED, LayerPlan
from moeplan.spec.workload import Workload
from moeplan.tests.plans import even_slots
from moeplan.tests.synthetic import cluster
from moeplan.tests.test_strategies import (
    EXPERTS,
    HIDDEN,
    MOE,
    TOLERANCE,
    layer_weights,
    routed,
    worst_error,
)

CHUNKS = (1, 2, 4, 8)
SPEEDS = {1: ((1.0,),), 2: ((1.0, 1.0),), 4: ((1.0, 1.0), (1.0, 1.0))}
COPIES = {
    1: (tuple(range(8)),),
    2: ((0, 1, 2, 3, 7), (3, 0, 7, 4, 5, 6)),
    4: ((0, 1, 2), (2, 0, 3, 4), (), (5, 6, 7, 0)),
}
SPLITS = {1: (12,), 2: (5, 7), 4: (1, 7, 0, 4)}
TOKENS = {
    1: {"some": (21,), "fewer than chunks": (3,), "none": (0,)},
    2: {"some": (9, 32), "fewer than chunks": (1, 3), "idle rank": (0, 17), "none": (0, 0)},
    4: {"some": (1, 9, 3, 40), "fewer than chunks": (3, 1, 2, 1), "idle ranks": (0, 7, 0, 6), "none": (0,) * 4},
}
ROUTINGS = ("random", "skewed")


def plans(world: int) -> dict[str, LayerPlan]:
    found = {}
    for strategy, count in itertools.product(CHUNKED, CHUNKS):
        if strategy == "sharded":
            plan = LayerPlan(strategy=strategy, slots=((),) * world, split=SPLITS[world], chunks=count)
            found[f"sharded in {count}"] = plan
            continue
        for name, slots in (("", even_slots(EXPERTS, world)), (", copies", COPIES[world])):
            found[f"{strategy}{name} in {count}"] = LayerPlan(strategy=strategy, slots=slots, chunks=count)
        for lags in ((0, 0), (count, 2 * count)) if strategy == "hierarchical" and count > 1 else ():
            order = led(count, *lags)  # one chunk after the other; one kind of call after the other
            found[f"{strategy} in {count}, {lags}"] = LayerPlan(
                strategy=strategy, slots=COPIES[world], chunks=count, order=order
            )
    return found


def hosts_of(world: int) -> list[int]:
    return [host for host, speeds in enumerate(SPEEDS[world]) for _ in speeds]


class Counted:
    """Bytes that this rank hands to every other, counted where torch.distributed is called."""

    def __init__(self) -> None:
        self.sent: Counter[int] = Counter()
        self._exchange, self._batch = dist.all_to_all_single, dist.batch_isend_irecv
        dist.all_to_all_single, dist.batch_isend_irecv = self._all_to_all, self._messages

    def _all_to_all(self, output, given, output_sizes=None, sizes=None, group=None, async_op=False):
        members = dist.get_process_group_ranks(group or dist.group.WORLD)
        rows = sizes or [len(given) // len(members)] * len(members)
        for member, count in zip(members, rows, strict=True):
            self.sent[member] += count * given[:1].nbytes if len(given) else 0
        return self._exchange(output, given, output_sizes, sizes, group=group, async_op=async_op)

    def _messages(self, operations):
        for message in operations:
            self.sent[message.peer] += message.tensor.nbytes if message.op is dist.isend else 0
        return self._batch(operations)


def on_rank(rank, job) -> dict[str, object]:
    """Errors by case, and bytes sent to the other ranks in the cases of f32."""
    hosts, errors, sent = hosts_of(rank.world), {}, {}
    levels, counted = open_levels(hosts), Counted()
    for dtype, (name, plan) in itertools.product(TOLERANCE, plans(rank.world).items()):
        context = LayerContext(rank.rank, hosts, MOE, HIDDEN, rank.device, Region(dtype, rank.device), levels)
        layer = strategy_of(plan, context)
        experts, (first, last), _ = layer.stored
        gate_up, down = (w[list(experts)] for w in layer_weights(dtype))
        layer.prepare(gate_up[:, :, first:last].contiguous(), down[:, :, first:last].contiguous())
        for split, routing in itertools.product(TOKENS[rank.world], ROUTINGS):
            counted.sent.clear()
            tokens = TOKENS[rank.world][split]
            case = f"{name} / {split} / {routing}"
            errors[f"{case} / {dtype}"] = worst_error(rank.rank, [layer], None, name, tokens, routing, dtype)
            if dtype == torch.float32:
                sent[case] = [counted.sent[g] if g != rank.rank else 0 for g in range(rank.world)]
        rank.emit({"strategy": name})
    return {"errors": errors, "sent": sent}


@pytest.fixture(scope="module", params=[1, 2, 4])
def found(request) -> SimpleNamespace:
    ranks = LocalLauncher(request.param).run("moeplan.tests.test_chunked_layers:on_rank", {}, timeout=120)
    return SimpleNamespace(world=request.param, ranks=ranks)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_every_number_of_chunks_equals_the_reference(found, dtype):
    errors = {case: max(rank["errors"][case] for rank in found.ranks) for case in found.ranks[0]["errors"]}
    of_dtype = {case: error for case, error in errors.items() if case.endswith(str(dtype))}
    assert len(of_dtype) == len(plans(found.world)) * len(TOKENS[found.world]) * len(ROUTINGS)
    wrong = {case: error for case, error in of_dtype.items() if not error < TOLERANCE[dtype]}
    assert not wrong


def test_the_bytes_sent_are_those_planned(found):
    """Between all pairs of ranks, counts included: rows of all chunks together, however they are cut."""
    model = Model(name="one", family="test", vocab_size=0, blocks=(Block(hidden_size=HIDDEN, moe=MOE),), dtype="f32")
    costs = Costs(cluster(model, SPEEDS[found.world]), model, "f32")
    for (name, plan), (split, tokens), routing in itertools.product(
        plans(found.world).items(), TOKENS[found.world].items(), ROUTINGS
    ):
        total = max(sum(tokens), 1)
        workload = Workload(phase="prefill", tokens=total, sequences=total)
        ids = routed(routing, sum(tokens), torch.float32)[2].numpy()
        layer = Layer.of(costs, model.layers[0], PlannedLayout(workload, 1, tokens, tokens), ids[None])
        links = Links(costs)
        links.add(build(layer, [plan]), 1)
        sent = np.array([rank["sent"][f"{name} / {split} / {routing}"] for rank in found.ranks])
        assert (sent == links.bytes).all(), (name, split, routing, sent, links.bytes)

"""Batch-aware selection of experts equals its specification, written out here in plain Python."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from moeplan.runtime.random_weights import RandomWeights
from moeplan.runtime.reference import ReferenceModel
from moeplan.runtime.router import choose
from moeplan.runtime.selected import Counting
from moeplan.runtime.selection import Selector, first_active, lynx_active, lynx_votes, preference
from moeplan.spec.errors import MoeplanError
from moeplan.spec.model import Gate
from moeplan.spec.selection import Selection
from moeplan.spec.workload import Workload
from moeplan.tests.synthetic import tiny_model

Rows = list[list[float]]


def order_of(row: Sequence[float], gate: Gate, bias: Sequence[float] | None) -> list[int]:
    """A token's order of all experts."""
    scores = [1 / (1 + math.exp(-x)) if gate.score == "sigmoid" else x for x in row]
    ranks = [s + b for s, b in zip(scores, bias, strict=True)] if bias else scores
    best = sorted(range(len(row)), key=lambda e: (-ranks[e], e))
    if gate.groups == 1:
        return best
    size, count = len(row) // gate.groups, 2 if gate.score == "sigmoid" else 1
    worth = [sum(sorted(ranks[g * size : (g + 1) * size])[-count:]) for g in range(gate.groups)]
    apart = sorted(worth)
    assume(all(b - a > 1e-4 for a, b in itertools.pairwise(apart)))  # which of equal groups is left open
    inside = sorted(range(gate.groups), key=lambda g: -worth[g])[: gate.top_groups]
    return [e for e in best if e // size in inside] + [e for e in best if e // size not in inside]


def active_of(rows: Rows, orders: list[list[int]], rule: str, keep: int, top_k: int) -> set[int]:
    if rule == "piggyback":
        return {e for order in orders for e in order[:keep]}
    sure: Counter[int] = Counter()
    bins: Counter[tuple[int, int]] = Counter()
    for row, order in zip(rows, orders, strict=True):
        first, own = row[order[0]], order[:top_k]
        for e in own:
            bins[e, min(3, max(0, math.floor(first - row[e])))] += 1
        if top_k == 1 or first - row[own[1]] >= 1.0:
            sure[own[0]] += 1
    experts = range(len(rows[0]))
    return set(sorted(experts, key=lambda e: (-sure[e], *(-bins[e, b] for b in range(4)), e))[:keep])


def weights_of(row: Sequence[float], ids: list[int], active: set[int], gate: Gate, rule: str) -> list[float]:
    if gate.score == "softmax_topk":
        raw = [math.exp(row[e]) for e in ids]
        return [x / sum(raw) * gate.scale for x in raw]
    if gate.score == "sigmoid":
        raw = [1 / (1 + math.exp(-row[e])) for e in ids]
    else:
        counted = active if rule == "lynx" else range(len(row))
        raw = [math.exp(row[e]) / sum(math.exp(row[f]) for f in counted) for e in ids]
    return [x / (sum(raw) if gate.normalize else 1) * gate.scale for x in raw]


def specified(
    rows: Rows, selection: Selection, gate: Gate, top_k: int, bias: Sequence[float] | None
) -> tuple[list[list[int]], list[list[float]]]:
    orders = [order_of(row, gate, bias) for row in rows]
    active = active_of(rows, orders, selection.rule, selection.keep, top_k)
    ids = [[e for e in order if e in active][:top_k] for order in orders]
    return ids, [weights_of(row, chosen, active, gate, selection.rule) for row, chosen in zip(rows, ids, strict=True)]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Rows, Selection, Gate, int, list[float] | None]:
    """Logits in quarters, so that ties are common and differences exact; some experts far above the others."""
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    experts = groups * draw(st.integers(1, 5))
    top_k = draw(st.integers(1, min(4, experts)))
    skew = draw(st.lists(st.sampled_from([0, 0, 0, 3]), min_size=experts, max_size=experts))
    quarters = st.integers(-12, 12)
    tokens = draw(st.integers(1, 9))
    rows = [[draw(quarters) / 4 + skew[e] for e in range(experts)] for _ in range(tokens)]
    score = draw(st.sampled_from(["softmax", "softmax_topk", "sigmoid"]))
    top_groups = draw(st.integers(1, groups))
    normalize, scale = draw(st.booleans()), draw(st.sampled_from([1.0, 2.5]))
    gate = Gate(score=score, normalize=normalize, scale=scale, groups=groups, top_groups=top_groups)
    bias = None
    if score == "sigmoid" and draw(st.booleans()):
        bias = [draw(quarters) / 64 for _ in range(experts)]
    rule = draw(st.sampled_from(["lynx", "piggyback"]))
    keep = draw(st.integers(top_k, experts) if rule == "lynx" else st.integers(1, top_k))
    return rows, Selection(rule=rule, keep=keep), gate, top_k, bias


@given(cases())
def test_equals_the_specification(case):
    rows, selection, gate, top_k, bias = case
    ids, weights = specified(rows, selection, gate, top_k, bias)
    correction = None if bias is None else torch.tensor(bias)
    got_ids, got_weights = Selector(selection)(torch.tensor(rows), gate, top_k, correction)
    assert got_ids.tolist() == ids
    torch.testing.assert_close(got_weights, torch.tensor(weights), rtol=1e-5, atol=1e-6)
    used = {e for chosen in ids for e in chosen}
    if selection.rule == "lynx":
        assert len(used) <= selection.keep
        assert {len(chosen) for chosen in ids} == {top_k}


@given(cases(), st.data())
def test_the_same_however_tokens_lie_on_devices(case, data):
    """Devices without tokens, and votes that are summed."""
    rows, selection, gate, top_k, bias = case
    for row in rows:
        order_of(row, gate, bias)  # equal groups are left open
    correction = None if bias is None else torch.tensor(bias)
    logits = torch.tensor(rows)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    parts = [logits[a:b] for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    votes = []
    for part in parts:
        Selector(selection, lambda v: votes.append(v.clone()) or v)(part, gate, top_k, correction)
    total = torch.stack(votes).sum(0)
    together = Selector(selection)(logits, gate, top_k, correction)
    apart = [Selector(selection, lambda v: total)(part, gate, top_k, correction) for part in parts]
    assert torch.equal(torch.cat([ids for ids, _ in apart]), together[0])
    torch.testing.assert_close(torch.cat([weights for _, weights in apart]), together[1])


@given(st.integers(1, 40), st.integers(0, 2**31), st.sampled_from(["softmax", "softmax_topk", "sigmoid"]))
def test_without_a_cut_it_is_the_gates_own_choice(tokens, seed, score):
    logits = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(seed))
    gate = Gate(score=score, normalize=seed % 2 == 0)
    ids, weights = choose(logits, gate, 3)
    distinct = len(ids.unique())
    for selection in (Selection(rule="lynx", keep=max(distinct, 3)), Selection(rule="piggyback", keep=3)):
        got = Selector(selection)(logits, gate, 3)
        assert torch.equal(got[0], ids)
        if gate.normalize or score != "softmax" or selection.rule == "piggyback":
            torch.testing.assert_close(got[1], weights)


def test_lynx_by_hand():
    """Expert 0: one confident token; 1: two tokens in bin 0; 2: one in bin 0; 3: bin 2; 4: nobody's choice."""
    logits = torch.tensor([[5.0, 0.0, 0.0, 3.0, -9.0], [0.0, 2.0, 1.5, -3.0, -9.0], [1.5, 2.0, 0.0, -3.0, -9.0]])
    own = preference(logits, Gate())[:, :2]
    assert own.tolist() == [[0, 3], [1, 2], [1, 0]]
    votes = lynx_votes(logits, own, 3)
    assert votes.tolist() == [[1, 2, 0, 0, 0], [0, 2, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert [lynx_active(votes, keep).nonzero()[:, 0].tolist() for keep in (1, 2, 3, 4)] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
    ]
    ids, _ = Selector(Selection(rule="lynx", keep=2))(logits, Gate(), 2)
    assert ids.tolist() == [[0, 1], [1, 0], [1, 0]]


def test_piggyback_by_hand():
    """Each keeps its first; the third token's second choice is nobody's first, so that it takes its third."""
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [2.0, 3.0, 1.0, 0.0], [3.0, 0.0, 1.0, 2.0]])
    ids, weights = Selector(Selection(rule="piggyback", keep=1))(logits, Gate(), 2)
    assert ids.tolist() == [[0, 1], [1, 0], [0, 1]]
    torch.testing.assert_close(weights[2], torch.tensor([3.0, 0.0]).softmax(0))
    alone = Selector(Selection(rule="piggyback", keep=1))(logits[:1], Gate(), 2)
    assert alone[0].tolist() == [[0]]  # nothing else is active
    assert first_active(preference(logits, Gate()), torch.tensor([False, True, True, True]), 3).tolist() == [
        [1, 2, 3],
        [1, 2, 3],
        [3, 2, 1],
    ]


def test_prompts_are_routed_by_the_gate():
    model = tiny_model(layers=2)
    source = RandomWeights(model, torch.float32, 3)
    counting = Counting(Selector(Selection(rule="piggyback", keep=1)))
    tokens = torch.randint(256, (3, 6), generator=torch.Generator().manual_seed(0))
    found = []
    for chooser in (choose, counting):
        reference = ReferenceModel(model, source, sequences=3, capacity=6)
        hidden = reference.forward_hidden(torch.nn.functional.embedding(tokens[:, :5].flatten(), source.embedding()))
        prompt = ReferenceModel(model, source, sequences=3, capacity=6)
        x = torch.nn.functional.embedding(tokens[:, :5].flatten(), source.embedding())
        assert torch.equal(prompt.forward_hidden(x, chooser=chooser), hidden)
        assert counting.counts == []
        found.append(prompt.decode(tokens[:, 5], chooser=chooser))
    assert len(counting.counts) == 2
    assert (found[0] - found[1]).abs().max() > 1e-3 * found[0].abs().max()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo", "selection 'foo': expected lynx:EXPERTS"),
        ("lynx", "expected lynx:EXPERTS"),
        ("lynx:0", "expected lynx:EXPERTS"),
        ("piggyback:-1", "expected lynx:EXPERTS"),
        ("piggyback:1.5", "expected lynx:EXPERTS"),
        ("lynx:99999999999", "expected lynx:EXPERTS"),
        ("lynx:1", "layer 0 of tiny has 8 experts, of which a token uses 2: give lynx:2 to lynx:8"),
        ("lynx:9", "give lynx:2 to lynx:8"),
        ("piggyback:3", "uses 2 experts: give piggyback:1 to piggyback:2"),
    ],
)
def test_what_cannot_be_selected_is_refused(text, message):
    with pytest.raises(MoeplanError, match=message):
        Selection.from_text(text).check(tiny_model(), Workload.from_text("decode:4@8"))


def test_prompts_and_models_without_a_vocabulary_are_refused():
    selection = Selection.from_text("lynx:4")
    with pytest.raises(MoeplanError, match="only decoding steps select, the plan is for prefill:8@4"):
        selection.check(tiny_model(), Workload.from_text("prefill:8@4"))
    with pytest.raises(MoeplanError, match="tiny has no vocabulary"):
        selection.check(tiny_model().model_copy(update={"vocab_size": 0}), Workload.from_text("decode:4@8"))
    assert str(Selection.from_text(" piggyback:2 ")) == "piggyback:2"

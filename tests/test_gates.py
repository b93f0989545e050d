"""Every gate equals its definition, written out here in plain Python; what they cost; where they run."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moeplan.runtime.calls import operator_call
from moeplan.runtime.gates import GATES
from moeplan.runtime.kernels import expert_ffn
from moeplan.runtime.random_weights import RandomWeights
from moeplan.runtime.reference import ReferenceModel
from moeplan.runtime.router import choose, route
from moeplan.runtime.selection import Selector
from moeplan.runtime.weights import RouterWeights
from moeplan.spec.errors import MoeplanError
from moeplan.spec.gate import Gate
from moeplan.spec.model import Model, Moe
from moeplan.spec.operators import route_shape
from moeplan.spec.selection import Selection
from moeplan.tests.synthetic import tiny_model

HIDDEN, EXPERTS, RANK = 8, 6, 3
Vector = Sequence[float]


def with_gate(gate: Gate, **moe: int) -> Model:
    model = tiny_model(layers=2, **moe)
    block = model.blocks[0]
    assert block.moe is not None
    return model.model_copy(
        update={"blocks": (block.model_copy(update={"moe": block.moe.model_copy(update={"gate": gate})}),)}
    )


def softmax(row: Vector) -> list[float]:
    powers = [math.exp(x - max(row)) for x in row]
    return [p / sum(powers) for p in powers]


def best(row: Vector, count: int) -> list[int]:
    return sorted(range(len(row)), key=lambda e: -row[e])[:count]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def normed_of(x: Vector) -> list[float]:
    """RMS norm with weights of one."""
    size = math.sqrt(sum(v * v for v in x) / len(x) + 1e-6)
    return [v / size for v in x]


def definition(gate: Gate, x: Vector, w: dict[str, list[Vector]], top_k: int) -> tuple[list[int], list[float]]:
    """Experts and weights of one token [D], from the papers' formulas."""
    x = normed_of(x)
    if gate.score == "cosine":
        z = [dot(row, x) for row in w["projection"]]
        length = math.sqrt(dot(z, z))
        logits = [dot(z, e) / length / math.sqrt(dot(e, e)) / 0.125 for e in w["weight"]]
    else:
        logits = [dot(row, x) for row in w["weight"]]
    if gate.score in ("softmax_topk", "noisy_topk"):
        ids = best(logits, top_k)
        return ids, [gate.scale * p for p in softmax([logits[e] for e in ids])]
    scores = [1 / (1 + math.exp(-x)) for x in logits] if gate.score == "sigmoid" else softmax(logits)
    ids = best(scores, top_k)
    total = sum(scores[e] for e in ids) if gate.normalize else 1.0
    return ids, [gate.scale * scores[e] / total for e in ids]


def drawn(gate: Gate, seed: int) -> RouterWeights:
    g = torch.Generator().manual_seed(seed)
    ones = torch.ones(HIDDEN)
    if gate.score == "cosine":
        embeddings, projection = torch.randn(EXPERTS, RANK, generator=g), torch.randn(RANK, HIDDEN, generator=g)
        return RouterWeights(
            1e-6, ones, embeddings, None, None, projection=projection, temperature=torch.tensor([0.125])
        )
    weight = torch.randn(EXPERTS, HIDDEN, generator=g)
    noise = torch.randn(EXPERTS, HIDDEN, generator=g) if gate.score == "noisy_topk" else None
    return RouterWeights(1e-6, ones, weight, None, None, noise=noise)


@given(
    st.sampled_from(sorted(GATES)), st.booleans(), st.sampled_from([1.0, 2.5]), st.integers(1, 3), st.integers(0, 2**31)
)
def test_token_gates_equal_their_definitions(score, normalize, scale, top_k, seed):
    gate = Gate(score=score, normalize=normalize, scale=scale, rank=RANK if score == "cosine" else None)
    weights, moe = drawn(gate, seed), Moe(num_experts=EXPERTS, top_k=top_k, ffn_size=4, gate=gate)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(seed + 1))
    lists = {n: t.tolist() for n in ("weight", "projection") if (t := getattr(weights, n)) is not None}
    wanted = [definition(gate, row, lists, top_k) for row in x.tolist()]
    for kernel in (None, "reference"):
        _, ids, gates = route(x, weights, moe, kernel=kernel)
        assert ids.tolist() == [chosen for chosen, _ in wanted]
        torch.testing.assert_close(gates, torch.tensor([values for _, values in wanted]), rtol=1e-4, atol=1e-5)


def test_noise_is_seeded_sized_by_the_token_and_off_by_default():
    gate = Gate(score="noisy_topk")
    weights, moe = drawn(gate, 3), Moe(num_experts=EXPERTS, top_k=2, ffn_size=4, gate=gate)
    assert weights.noise is not None
    x = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(0))

    def chosen(seed: int | None, like: RouterWeights = weights) -> torch.Tensor:
        return route(x, like, moe, noise=None if seed is None else torch.Generator().manual_seed(seed))[1]

    assert torch.equal(chosen(7), chosen(7))
    assert not torch.equal(chosen(7), chosen(8))
    assert not torch.equal(chosen(7), chosen(None))
    quiet = RouterWeights(1e-6, weights.norm, weights.weight, None, None, noise=torch.zeros_like(weights.noise))
    spread = (chosen(7, quiet) != chosen(None)).float().mean()  # softplus(0) = ln 2 for every token
    assert 0.1 < spread < 0.9
    # By the formula: logits + N(0, 1) softplus(x W).
    normed, ids, _ = route(x, weights, moe, noise=torch.Generator().manual_seed(7))
    draws = torch.randn(200, EXPERTS, generator=torch.Generator().manual_seed(7))
    size = torch.log1p(torch.exp(normed @ weights.noise.T))
    assert torch.equal((normed @ weights.weight.T + draws * size).topk(2).indices, ids)


def chosen_by_experts(rows: list[Vector], top_k: int) -> list[dict[int, float]]:
    """Of every token its experts and their scores."""
    scores = [softmax(row) for row in rows]
    experts = len(rows[0])
    capacity = min(len(rows), math.ceil(len(rows) * top_k / experts))
    found: list[dict[int, float]] = [{} for _ in rows]
    for e in range(experts):
        for t in sorted(range(len(rows)), key=lambda t: (-scores[t][e], t))[:capacity]:
            found[t][e] = scores[t][e]
    return found


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 3), st.booleans(), st.integers(0, 2**31))
def test_experts_choose_tokens(tokens, experts, top_k, normalize, seed):
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed)) * 2
    gate = Gate(score="expert_choice", normalize=normalize)
    ids, weights = choose(logits, gate, min(top_k, experts))
    wanted = chosen_by_experts(logits.tolist(), min(top_k, experts))
    for row_ids, row_weights, mine in zip(ids.tolist(), weights.tolist(), wanted, strict=True):
        held = {e: w for e, w in zip(row_ids, row_weights, strict=True) if e >= 0}
        total = sum(mine.values()) if normalize and mine else 1.0
        assert held == pytest.approx({e: s / total for e, s in mine.items()}, rel=1e-4)
        assert all(w == 0 for e, w in zip(row_ids, row_weights, strict=True) if e < 0)
        assert row_weights == sorted(row_weights, reverse=True)
    assert ids.shape[1] == max(1, *(len(mine) for mine in wanted))


@pytest.mark.parametrize("kernel", [None, "reference", "grouped"])
def test_nobody_computes_empty_places(kernel):
    """A token that no expert takes gets zeros, others the sum over their experts."""
    logits = torch.tensor([[9.0, 9.0, 0.0], [0.0, 9.0, 9.0], [0.0, 0.0, 0.0], [9.0, 0.0, 9.0]])
    ids, weights = choose(logits, Gate(score="expert_choice", normalize=False), 1)
    assert (ids[2] == -1).all()
    g = torch.Generator().manual_seed(0)
    x, gate_up = torch.randn(4, 8, generator=g), torch.randn(3, 2, 5, 8, generator=g)
    down = torch.randn(3, 8, 5, generator=g)
    y = expert_ffn(x, gate_up, down, ids, weights, activation="silu", implementation=kernel)
    assert (y[2] == 0).all()
    for t in (0, 1, 3):
        each = [
            w * (down[e] @ (torch.nn.functional.silu(gate_up[e, 0] @ x[t]) * (gate_up[e, 1] @ x[t])))
            for e, w in zip(ids[t].tolist(), weights[t], strict=True)
            if e >= 0
        ]
        torch.testing.assert_close(y[t], torch.stack(each).sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("score", ["noisy_topk", "cosine"])
def test_models_with_the_gates_run_and_their_parameters_are_counted(score):
    gate = Gate(score=score, rank=16 if score == "cosine" else None)
    model = with_gate(gate)
    source = RandomWeights(model, torch.float32, 1)
    router = source.router(0)
    assert router is not None
    held = (router.weight, router.noise, router.projection, router.temperature)
    moe = model.blocks[0].moe
    assert moe is not None
    assert moe.always_on_parameters(64) == sum(t.numel() for t in held if t is not None)
    tokens = torch.randint(256, (2, 5), generator=torch.Generator().manual_seed(0))
    logits = ReferenceModel(model, source, sequences=2, capacity=5).prefill(tokens)
    assert torch.isfinite(logits).all()
    counts = torch.stack([torch.bincount(route(torch.randn(64, 64), router, moe)[1].flatten(), minlength=8)])
    assert (counts > 0).sum() > 4  # tokens differ
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(2))
    selected = route(x, router, moe, chooser=Selector(Selection(rule="lynx", keep=2)))
    assert len(selected[1].unique()) == 2


def test_the_router_of_a_cosine_gate_is_timed_by_its_rank():
    plain, cosine = (with_gate(g).blocks[0] for g in (Gate(), Gate(score="cosine", rank=16)))
    assert route_shape(cosine) == route_shape(plain) | {"rank": 16}
    assert route_shape(with_gate(Gate(score="noisy_topk")).blocks[0]) == route_shape(plain)
    model = with_gate(Gate(score="cosine", rank=16))
    places = {"devices": 1, "tensor": 1}
    operator_call("route", model, model.blocks[0], torch.float32, torch.device("cpu"), tokens=5, **places)()


def test_expert_choice_is_refused_for_causal_models():
    with pytest.raises(MoeplanError, match=r"layer 0: .* expert choice in a causal model: whether an expert takes"):
        RandomWeights(with_gate(Gate(score="expert_choice")), torch.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score": "cosine"}, "rank belongs to score cosine"),
        ({"score": "softmax", "rank": 4}, "rank belongs to score cosine"),
        ({"score": "cosine", "rank": 4, "bias": True}, "a cosine gate has no bias"),
        ({"score": "expert_choice", "groups": 2}, "neither groups nor a correction bias"),
        ({"score": "soft"}, "Input should be"),
    ],
)
def test_gates_that_make_no_sense(fields, message):
    with pytest.raises(ValidationError, match=message):
        Gate(**fields)

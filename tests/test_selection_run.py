"""Selection on ranks equals one process under every strategy; ``moeplan run --select``; what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from moeplan.runtime.check import gather_rows
from moeplan.runtime.coherent import executor_of
from moeplan.runtime.launch import LocalLauncher, Rank
from moeplan.runtime.random_weights import RandomWeights
from moeplan.runtime.reference import ReferenceModel
from moeplan.runtime.router import Chooser, choose
from moeplan.runtime.selected import differences, open_selector, read_context
from moeplan.runtime.selection import Selector
from moeplan.spec import Model, Plan, Report
from moeplan.spec.model import Gate
from moeplan.spec.plan import LayerPlan
from moeplan.spec.selection import Selection
from moeplan.tests.plans import even_slots, hand_made_plan
from moeplan.tests.synthetic import shortcut_model, tiny_model
from moeplan.tests.test_cli import moeplan

PROMPT, DECODE, SEQUENCES = 5, 3, 6
SELECTIONS = ("lynx:3", "piggyback:1")
HELD = {1: (6,), 2: (4, 2), 4: (3, 0, 2, 1)}  # sequences of each device
SPLIT = {1: (128,), 2: (128, 0), 4: (40, 0, 8, 80)}
GROUPED = Gate(score="sigmoid", correction_bias=True, groups=4, top_groups=2)


def with_gate(model: Model, gate: Gate) -> Model:
    blocks = (b.model_copy(update={"moe": b.moe.model_copy(update={"gate": gate})}) for b in model.blocks if b.moe)
    return model.model_copy(update={"blocks": tuple(blocks)})


MODELS = {
    "softmax": tiny_model(layers=2, shared=32),
    "softmax_topk": with_gate(tiny_model(layers=2), Gate(score="softmax_topk", bias=True)),
    "grouped sigmoid": with_gate(tiny_model(layers=2), GROUPED),
    "cosine": with_gate(tiny_model(layers=2), Gate(score="cosine", rank=16)),
    "shortcut": shortcut_model("output", shared=32),
}


def cases(world: int) -> dict[str, tuple[str, int, LayerPlan]]:
    """name -> (model, tensor, layer)"""
    even = even_slots(8, world)
    ep = LayerPlan(strategy="ep", slots=even)
    sharded = LayerPlan(strategy="sharded", slots=((),) * world, split=SPLIT[world])
    found = {f"ep, {name}": (name, 1, ep) for name in MODELS}
    found |= {
        "ep, chunks": ("softmax", 1, LayerPlan(strategy="ep", slots=even, chunks=2)),
        "sharded": ("grouped sigmoid", 1, sharded),
        "gathered": ("softmax", 1, LayerPlan(strategy="gathered", slots=even)),
        "hierarchical": ("softmax", 1, LayerPlan(strategy="hierarchical", slots=even)),
        "coherent": ("softmax_topk", 1, LayerPlan(strategy="coherent", slots=even)),
    }
    if world > 1:
        found["gathered, tensor 2"] = ("grouped sigmoid", 2, LayerPlan(strategy="gathered", slots=even))
    return found


def tokens() -> torch.Tensor:
    return torch.randint(256, (SEQUENCES, PROMPT + DECODE), generator=torch.Generator().manual_seed(5))


def wanted(model: Model, chooser: Chooser) -> torch.Tensor:
    """[DECODE, sequences, V] logits of the single process."""
    source = RandomWeights(model, torch.float32, 11)
    reference = ReferenceModel(model, source, sequences=SEQUENCES, capacity=PROMPT + DECODE)
    reference.prefill(tokens()[:, :PROMPT])
    return torch.stack([reference.decode(tokens()[:, i], chooser) for i in range(PROMPT, PROMPT + DECODE)])


def planned(world: int, name: str) -> Plan:
    model, tensor, layer = cases(world)[name]
    held = HELD[world]
    if tensor == 2:
        held = {2: (4, 2), 4: (2, 2, 2, 0)}[world]
    hosts = ["a", "a", "b", "b"][:world]
    workload = f"decode:{SEQUENCES}@{PROMPT}"
    return hand_made_plan(MODELS[model], workload, [layer], tokens=held, tensor=tensor, hosts=hosts)


def on_rank(rank: Rank, job: dict) -> dict[str, list[float]]:
    """By case and selection: relative error of the logits, and how far they are from the exact ones, on rank 0."""
    found = {}
    for name in cases(rank.world):
        plan = planned(rank.world, name)
        source = RandomWeights(plan.model, torch.float32, 11)
        executor = executor_of(plan, rank.rank, source, device=torch.device("cpu"), capacity=PROMPT + DECODE)
        read_context(executor, tokens()[:, :PROMPT])
        layout = executor.layout
        for text in SELECTIONS:
            selector, got = open_selector(Selection.from_text(text)), []
            for i in range(PROMPT, PROMPT + DECODE):
                output = executor.step(tokens()[layout.own, i], layout, i, chooser=selector)
                got.append(gather_rows(output.logits, layout.last_counts))
            if rank.rank == 0:
                alone = wanted(plan.model, Selector(Selection.from_text(text)))
                exact, size = wanted(plan.model, choose), alone.abs().max()
                errors = [(torch.stack(got) - alone).abs().max() / size, (alone - exact).abs().max() / size]
                found[f"{name}, {text}"] = [error.item() for error in errors]
        rank.emit({"case": name})
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_choose_as_one_process(world):
    """Devices without tokens and tensor groups included."""
    errors = LocalLauncher(world).run("moeplan.tests.test_selection_run:on_rank", {}, timeout=120)[0]
    assert len(errors) == len(cases(world)) * len(SELECTIONS)
    assert max(error for error, _ in errors.values()) < 1e-4, errors
    assert min(moved for _, moved in errors.values()) > 1e-3, errors  # else the equality means nothing


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory) -> Path:
    seats = LocalLauncher(2, threads=1).seats
    layers = [LayerPlan(strategy="ep", slots=even_slots(8, 2)), LayerPlan(strategy="gathered", slots=even_slots(8, 2))]
    plan = hand_made_plan(
        MODELS["softmax"],
        "decode:7@12",
        layers,
        tokens=(5, 2),
        hosts=[seat.host for seat in seats],
        cpu_share=seats[0].cpu_share,
    )
    return plan.write(tmp_path_factory.mktemp("selection") / "plan.json")


def test_run_compares_a_selection_with_the_models_own_routing(plan_file, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    run = ("run", plan_file, "--tolerance", "1e9", "--repetitions", "3", "--select", "piggyback:1")
    code, out, err = moeplan(monkeypatch, capfd, *run, "--quality-budget", "9", "-o", "r.json")
    assert code == 0, err
    assert "distinct experts, layer 1 (of 8)" in out
    assert "--text gives the model something to read" in " ".join(err.split())
    report = Report.read("r.json")
    found = report.selection
    assert found is not None
    assert (str(found.selection), found.budget, found.tokens, found.perplexity) == ("piggyback:1", 9.0, 7 * 8, None)
    assert [layer.layer for layer in found.layers] == [0, 1]
    assert all(1 <= layer.after < layer.before <= 8 for layer in found.layers)
    assert 0 < found.divergence < 9
    assert 0 <= found.changed <= 1
    assert found.check is not None
    assert found.check.relative_error < 1e-4
    assert report.check is not None
    assert report.check.passed
    assert found.speedup_low <= found.speedup <= found.speedup_high
    assert found.exact_seconds == report.step.measured
    code, out, _ = moeplan(monkeypatch, capfd, *run, "--quality-budget", "0", "-o", "r.json", "--json")
    assert code == 1
    body = json.loads(out)
    assert body["selection"]["passed"] is body["passed"] is False
    # Every choice kept: nothing changes, and no budget is needed.
    code, _, _ = moeplan(monkeypatch, capfd, *run[:-1], "piggyback:2", "--quality-budget", "0", "-o", "r.json")
    assert code == 0
    same = Report.read("r.json").selection
    assert same is not None
    assert (same.divergence, same.changed) == (0, 0)
    assert all(layer.before == layer.after for layer in same.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--select", "foo", "--quality-budget", "1"), "selection 'foo': expected lynx:EXPERTS"),
        (("--select", "lynx:4"), "--select lynx:4 needs --quality-budget NATS"),
        (("--select", "lynx:4", "--quality-budget", "inf"), "--quality-budget inf: expected a number of nats"),
        (("--select", "lynx:4", "--quality-budget", "nan"), "quality-budget"),
        (("--select", "lynx:4", "--quality-budget", "-1"), "quality-budget"),
        (("--select", "lynx:1", "--quality-budget", "1"), "give lynx:2 to lynx:8"),
        (("--select", "piggyback:3", "--quality-budget", "1"), "give piggyback:1 to piggyback:2"),
        (("--quality-budget", "1"), "--quality-budget goes with --select"),
        (("--text", "x.txt"), "--text goes with --select"),
        (("--select", "lynx:4", "--quality-budget", "1", "--text", "x.txt"), "--text needs --weights"),
    ],
)
def test_bad_options_are_one_line(plan_file, options, message, monkeypatch, capfd):
    code, _, err = moeplan(monkeypatch, capfd, "run", plan_file, *options)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_a_plan_for_prompts_is_refused(tmp_path, monkeypatch, capfd):
    layer = LayerPlan(strategy="ep", slots=even_slots(8, 1))
    plan = hand_made_plan(MODELS["softmax"], "prefill:8@4", [layer], tokens=(8,)).write(tmp_path / "p.json")
    code, _, err = moeplan(monkeypatch, capfd, "run", plan, "--select", "lynx:4", "--quality-budget", "1")
    assert code == 2
    assert "only decoding steps select, the plan is for prefill:8@4" in " ".join(err.split())


def test_differences_by_hand():
    exact, selected = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    p = torch.tensor([1.0, 0.0]).double().softmax(0)
    divergence = (p[0] - p[1]).item()  # p . (log p - log q) with swapped entries, one nat apart
    got = differences(exact, selected, torch.tensor([0, 1])).tolist()
    surprise = -p.log()
    ln2 = torch.tensor(2.0).double().log().item()
    assert got == pytest.approx([divergence, 1, ln2 + surprise[1].item(), ln2 + surprise[0].item(), 2])
    assert differences(exact, selected, None).tolist() == pytest.approx([divergence, 1, 0, 0, 2])

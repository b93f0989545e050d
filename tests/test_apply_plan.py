"""``apply_plan``: what it keeps, what it refuses, idle ranks, groups, fine-tuning."""

import copy
import itertools
import json
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import moeplan.transformers  # noqa: E402
from moeplan.profiler.families import read_family  # noqa: E402
from moeplan.runtime.embedding.apply import check  # noqa: E402
from moeplan.runtime.embedding.form import experts_modules  # noqa: E402
from moeplan.runtime.embedding.package import check_version  # noqa: E402
from moeplan.runtime.launch import LocalLauncher  # noqa: E402
from moeplan.spec import MoeplanError  # noqa: E402
from moeplan.spec.plan import Degrees, LayerPlan  # noqa: E402
from moeplan.tests.plans import hand_made_plan  # noqa: E402
from moeplan.tests.small_families import EXPERTS, build, experts_per_token, plan_for, small_config  # noqa: E402

UNEVEN = ((5, 0, 3), (1, 2, 4, 6, 7))
PLANS = {
    "ep": LayerPlan(strategy="ep", slots=UNEVEN),
    "ep, one rank without": LayerPlan(strategy="ep", slots=((), tuple(range(EXPERTS)))),
    "ep, copies": LayerPlan(strategy="ep", slots=((5, 0, 3, 7), (1, 2, 4, 6, 7, 0))),
    "ep, by batch": LayerPlan(strategy="ep", slots=((5, 0, 3, 7), (1, 2, 4, 6, 7, 0)), speeds=(1.0, 0.5)),
    "ep, chunks": LayerPlan(strategy="ep", slots=UNEVEN, chunks=4),
    "hierarchical": LayerPlan(strategy="hierarchical", slots=UNEVEN),
    "gathered": LayerPlan(strategy="gathered", slots=UNEVEN),
    "sharded": LayerPlan(strategy="sharded", slots=((), ()), split=(17, 31)),
    "sharded, chunks": LayerPlan(strategy="sharded", slots=((), ()), split=(17, 31), chunks=3),
    "sharded, one rank without": LayerPlan(strategy="sharded", slots=((), ()), split=(0, 48)),
}
FAMILIES = ("mixtral", "gpt_oss")  # by the kernels, and by the module's own functions
BATCHES = {"uneven": (3, 1), "rank 1 idle": (2, 0), "rank 0 idle": (0, 1), "all idle": (0, 0)}


def planned(family: str, name: str):
    return plan_for(build(family), lambda form: PLANS[name])


def prompts(rank: int, sequences: int):
    return torch.randint(3, 128, (sequences, 7), generator=torch.Generator().manual_seed(rank))


def on_rank(rank, job) -> dict[str, object]:
    """By family and plan: share of the parameters kept, and the largest error of each batch, relative to the largest
    logit; and what refusals said."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    found: dict[str, object] = {}
    for family in FAMILIES:
        whole = build(family)
        total = sum(p.numel() for p in whole.parameters())
        for name in PLANS:
            net = moeplan.transformers.apply_plan(copy.deepcopy(whole), planned(family, name))
            found[f"{family}, {name}: kept"] = sum(p.numel() for p in net.parameters()) / total
            for batch, sequences in BATCHES.items():
                found[f"{family}, {name}, {batch}"] = error(net, whole, prompts(rank.rank, sequences[rank.rank]))
            rank.emit({"done": name})
    return found | in_groups(rank.rank) | refusals(rank.rank)


def in_groups(rank: int) -> dict[str, object]:
    """Of both ranks, and of each alone."""
    dist, found = torch.distributed, {}
    groups = {"pair": dist.new_group([0, 1]), "alone": [dist.new_group([r]) for r in (0, 1)][rank]}
    for (where, group), name in itertools.product(groups.items(), ("ep", "ep, by batch", "sharded", "gathered")):
        whole, plan = build("mixtral"), PLANS[name]
        if where == "alone":
            everything = tuple(range(EXPERTS))
            plan = LayerPlan(strategy=plan.strategy, slots=(everything,), split=(48,) if plan.split else None)
        document = plan_for(whole, lambda form, plan=plan: plan, ranks=len(plan.slots))
        net = moeplan.transformers.apply_plan(copy.deepcopy(whole), document, group)
        found[f"{where}: {name}"] = error(net, whole, prompts(rank, 2 + rank))
    divided = planned("mixtral", "ep").model_copy(update={"degrees": Degrees(tensor=2, data=1, expert=2)})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        net = moeplan.transformers.apply_plan(copy.deepcopy(whole), divided)
    found["pair: attention divided"] = error(net, whole, prompts(rank, 1))
    found["told"] = " ".join(str(warning.message) for warning in told)
    try:
        moeplan.transformers.apply_plan(build("mixtral"), planned("mixtral", "ep"), groups["alone"])
    except MoeplanError as problem:
        found["a group of another size"] = str(problem)
    return found


@torch.no_grad()
def error(net, whole, tokens) -> float:
    if not len(tokens):
        moeplan.transformers.idle(net)
        return 0.0
    got, wanted = net(tokens, use_cache=False).logits, whole(tokens, use_cache=False).logits
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def refusals(rank: int) -> dict[str, object]:
    """Where only one rank cannot, or was given something else, nobody changes anything."""
    said: dict[str, object] = {}
    net = build("mixtral")
    before = {name: p.data_ptr() for name, p in net.named_parameters()}
    plans = {
        "another plan": planned("mixtral", "ep" if rank else "sharded"),
        "one is wrong": planned("mixtral", "ep") if rank else plan_for(net, lambda form: PLANS["ep"], ffn_size=40),
        "other dtypes": planned("mixtral", "ep"),
        "a placement": {"slots": []},
        "three devices": plan_for(net, lambda form: LayerPlan(strategy="ep", slots=(*UNEVEN, ())), ranks=3),
    }
    half = copy.deepcopy(net).bfloat16()
    for name, plan in plans.items():
        try:
            moeplan.transformers.apply_plan(half if rank and name == "other dtypes" else net, plan)
            said[name] = "nothing"
        except MoeplanError as problem:
            said[name] = str(problem)
    said["unchanged"] = before == {name: p.data_ptr() for name, p in net.named_parameters()}
    return said


@pytest.fixture(scope="module")
def found() -> list[dict[str, object]]:
    return LocalLauncher(2).run("moeplan.tests.test_apply_plan:on_rank", {}, timeout=300)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_whole_model(found, family: str, name: str, batch: str) -> None:
    assert max(rank[f"{family}, {name}, {batch}"] for rank in found) < 1e-4


def test_logits_in_groups(found) -> None:
    for rank in found:
        errors = {case: rank[case] for case in rank if case.startswith(("pair:", "alone:"))}
        assert len(errors) == 9
        assert "attention over 2 devices, here it stays whole" in rank["told"]
        assert max(errors.values()) < 1e-4
        assert rank["a group of another size"].startswith("the plan is for 2 devices, the group has 1 ranks")


@pytest.mark.parametrize("name", PLANS)
def test_a_rank_keeps_its_part_only(found, name: str) -> None:
    kept = [rank[f"mixtral, {name}: kept"] for rank in found]
    assert sum(kept) < 1.9 if "copies" not in name and "batch" not in name else sum(kept) < 2.0
    if "without" in name:
        assert kept[0] < 0.5 < kept[1] == 1.0


def test_all_ranks_refuse_together_and_nothing_is_changed(found) -> None:
    first, second = found
    assert "ranks 0 and 1 were given another plan or model" in first["another plan"]
    assert first["another plan"] == second["another plan"]
    assert first["one is wrong"] == (
        "layer 0 (model.layers.0.mlp.experts): 48 FFN columns, the plan of mixtral has 40: solve for this model"
    )
    assert "rank 0 refused the plan" in second["one is wrong"]
    assert "the plan is for 3 devices, the group has 2 ranks" in first["three devices"]
    assert "ranks 0 and 1 were given another plan or model" in first["other dtypes"]
    assert "expected a Plan or its path, got dict" in first["a placement"]
    assert first["unchanged"]
    assert second["unchanged"]


def changed(family: str, **changes):
    """A plan whose description of the experts says something else."""
    return plan_for(build(family), lambda form: PLANS["ep"], **changes)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (lambda: changed("mixtral", ffn_size=40), "48 FFN columns, the plan of mixtral has 40"),
        (lambda: changed("mixtral", gated=False), "2 matrices before the activation, the plan of mixtral has 1"),
        (
            lambda: plan_for(build("glm4_moe"), lambda form: PLANS["ep"]),
            "3 layers with experts, the plan of glm4_moe has 2",
        ),
        (lambda: planned("mixtral", "ep").model_copy(update={"layers": ()}), "has 0"),
    ],
)
def test_plans_of_other_sizes_are_refused(plan, reason: str) -> None:
    with pytest.raises(MoeplanError, match=reason):
        check(build("mixtral"), plan(), 2, everyone=True)


def test_a_family_without_the_interface_is_refused_by_name() -> None:
    family = "jetmoe"
    with torch.device("meta"):
        net = transformers.AutoModelForCausalLM.from_config(small_config(family))
    with pytest.raises(MoeplanError, match=rf"{family}: its experts .*`moeplan place`, `explain`, `compare`") as raised:
        experts_modules(net)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("found", ["5.19.3", "5.24.0", "4.57.1", "6.0", "main"])
def test_other_versions_are_refused(found: str) -> None:
    with pytest.raises(MoeplanError, match=rf"Transformers {found}: .* 5\.20 to 5\.23: pip install"):
        check_version(found)


@pytest.mark.parametrize("found", ["5.20.0", "5.22.1", "5.23.0.dev0"])
def test_tested_versions_are_taken(found: str) -> None:
    check_version(found)


def test_without_torch_distributed_it_is_refused() -> None:
    net = build("mixtral")
    with pytest.raises(MoeplanError, match=r"torch\.distributed is not initialised"):
        moeplan.transformers.apply_plan(net, planned("mixtral", "ep"))
    with pytest.raises(MoeplanError, match="no plan is applied"):
        moeplan.transformers.idle(net)


def test_what_is_not_loaded_plainly_is_refused() -> None:
    net = build("mixtral")
    net.model.layers[1].mlp.experts.to("meta")
    with pytest.raises(MoeplanError, match=r"layers\.1\.mlp\.experts\.gate_up_proj is on the meta device"):
        check(net, planned("mixtral", "ep"), 2, everyone=True)
    with pytest.raises(MoeplanError, match="expected a loaded Transformers model, got str"):
        check("mixtral", planned("mixtral", "ep"), 2, everyone=True)


@pytest.mark.parametrize("family", ["gemma4_text", "glm4_moe", "gpt_oss", "jamba", "qwen3_next", "zaya"])
def test_plans_of_models_as_they_are_read_fit(family: str) -> None:
    """What the planner reads of a configuration is what the model's experts are called with."""
    body = json.loads(small_config(family).to_json_string(use_diff=False))
    model = read_family(body, family, family, "")
    layer = LayerPlan(strategy="ep", slots=UNEVEN)
    found = check(build(family), hand_made_plan(model, "prefill:2@1", [layer], tokens=(1, 1)), 2, everyone=True)
    assert {asked.moe.top_k for asked in found} == {experts_per_token(build(family))}

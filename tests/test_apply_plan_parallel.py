"""Fine-tuning under a plan, and Transformers' own expert parallelism by moeplan's exchange, beside the whole model."""

import contextlib
import copy
import itertools
import os
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import moeplan.transformers  # noqa: E402
from moeplan.runtime.embedding import compute, parallel  # noqa: E402
from moeplan.runtime.embedding.form import experts_modules, form_of  # noqa: E402
from moeplan.runtime.embedding.part import own_part  # noqa: E402
from moeplan.runtime.launch import LocalLauncher  # noqa: E402
from moeplan.spec import MoeplanError  # noqa: E402
from moeplan.spec.plan import LayerPlan  # noqa: E402
from moeplan.tests.small_families import build, plan_for  # noqa: E402

UNEVEN = ((5, 0, 3), (1, 2, 4, 6, 7))
PLANS = {
    "ep": LayerPlan(strategy="ep", slots=UNEVEN),
    "hierarchical": LayerPlan(strategy="hierarchical", slots=UNEVEN),
    "gathered": LayerPlan(strategy="gathered", slots=UNEVEN),
    "sharded": LayerPlan(strategy="sharded", slots=((), ()), split=(17, 31)),
}
COPIES = LayerPlan(strategy="ep", slots=((0, 1, 2, 3), (3, 4, 5, 6, 7)))
FAMILIES = ("mixtral", "gpt_oss")
STEPS, RATE, TOLERANCE = 2, 0.05, 1e-4
WAYS = ["kernels", "own functions"]
MESHES = {"same tokens": {"tp_size": 2}, "own tokens": {"fsdp_size": 2}}


def batch(rank: int) -> torch.Tensor:
    return torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(rank))


def loss(net: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens."""
    logits = net(tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def step(net: torch.nn.Module, tokens: torch.Tensor, ranks: int) -> None:
    """Of plain gradient descent, as docs/transformers.md says: experts' gradients are sums over ranks."""
    loss(net, tokens).backward()
    experts = {id(p) for module in experts_modules(net).values() for p in module.parameters()}
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is None:
                continue
            if ranks > 1 and id(parameter) not in experts:
                torch.distributed.all_reduce(parameter.grad)
            parameter -= RATE / ranks * parameter.grad
            parameter.grad = None


def difference(net: torch.nn.Module, whole: torch.nn.Module, plan: LayerPlan, rank: int) -> float:
    """The largest of what this rank has learned otherwise than the whole model, relative to what it learned at all."""
    start, worst = build(whole.config.model_type), 0.0
    parts = {name: None for name, _ in net.named_parameters()}
    for (name, module), before in zip(experts_modules(whole).items(), experts_modules(start).values(), strict=True):
        form = form_of(name, module)
        first = 17 if plan.split and rank else 0
        columns = (first, first + plan.split[rank]) if plan.split else (0, form.ffn)
        experts = range(form.experts) if plan.split else plan.slots[rank]
        kept = [
            own_part([getattr(m, key) for key in form.names], form, experts, columns, rank == 0)
            for m in (module, before)
        ]
        parts |= {f"{name}.{key}": both for key, *both in zip(form.names, *kept, strict=True)}
    now, old = dict(whole.named_parameters()), dict(start.named_parameters())
    for name, parameter in net.named_parameters():
        wanted, begun = parts[name] or (now[name], old[name])
        learned = (wanted - begun).abs().max()
        worst = max(worst, ((parameter - wanted).abs().max() / learned.clamp(min=1e-3)).item())
    return worst


@contextlib.contextmanager
def computed(way: str):
    """Experts by moeplan's kernels, or by the module's own functions as where there is no kernel."""
    with pytest.MonkeyPatch.context() as patch:
        if way == "own functions":
            patch.setattr(compute, "kernel_activation", lambda module, form: None)
        yield


def own_error(whole: torch.nn.Module, exact: torch.nn.Module) -> float:
    """The same of the undivided model in f32: what its rounding alone makes."""
    start, now = dict(build(whole.config.model_type).named_parameters()), dict(exact.named_parameters())
    return max(
        ((parameter - now[name]).abs().max() / (now[name] - start[name]).abs().max().clamp(min=1e-3)).item()
        for name, parameter in whole.named_parameters()
    )


def on_rank(rank, job) -> dict[str, float | str]:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    found: dict[str, float | str] = {}
    for family in FAMILIES:
        whole, exact = build(family), build(family).double()
        exact.set_experts_implementation("eager")
        for _ in range(STEPS):
            for net in (whole, exact):
                step(net, torch.cat([batch(0), batch(1)]), 1)
        found[f"{family}, whole"] = own_error(whole, exact)
        for (name, plan), way in itertools.product(PLANS.items(), WAYS):
            with computed(way):
                net = build(family)
                moeplan.transformers.apply_plan(net, plan_for(build(family), lambda form, plan=plan: plan))
                for _ in range(STEPS):
                    step(net, batch(rank.rank), 2)
            for reference, model in (("f32", whole), ("f64", exact)):
                found[f"{family}, {name}, {way}, {reference}"] = difference(net, model, plan, rank.rank)
            rank.emit({"done": name})
    net = moeplan.transformers.apply_plan(build("mixtral"), plan_for(build("mixtral"), lambda form: COPIES))
    value = loss(net, batch(rank.rank))
    found["copies"] = abs(value.item() / loss(build("mixtral"), batch(rank.rank)).item() - 1)
    try:
        value.backward()
    except MoeplanError as problem:
        found["copies, backward"] = str(problem)
    return found | split_by_transformers(rank, job["folder"])


def split_by_transformers(rank, folder: str) -> dict[str, float | str]:
    """Errors of the logits; and the number of calls."""
    from transformers.distributed import DistributedConfig

    moeplan.transformers.register()
    os.environ.update(RANK=str(rank.rank), LOCAL_RANK=str(rank.rank), WORLD_SIZE="2")
    found: dict[str, float | str] = {}
    calls = itertools.count()
    plain = parallel.Shared.__call__

    def counted(self, *args):
        next(calls)
        return plain(self, *args)

    parallel.Shared.__call__ = counted
    for family, (name, mesh) in itertools.product(FAMILIES, MESHES.items()):
        config = DistributedConfig(ep_size=2, ep_implementation="moeplan", **mesh)
        path = f"{folder}/{family}"
        net = transformers.AutoModelForCausalLM.from_pretrained(path, distributed_config=config, dtype=torch.float32)
        tokens = batch(0 if name == "same tokens" else rank.rank)
        with torch.no_grad():
            got, wanted = net.eval()(tokens, use_cache=False).logits, build(family)(tokens, use_cache=False).logits
        found[f"{family}, {name}"] = ((got - wanted).abs().max() / wanted.abs().max()).item()
    return found | {"calls": float(next(calls))}


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, float | str]]:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        build(family).save_pretrained(folder / family)
    job = {"folder": str(folder)}
    return LocalLauncher(2).run("moeplan.tests.test_apply_plan_parallel:on_rank", job, timeout=300)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_of_fine_tuning_learn_what_the_whole_model_does(found, family: str, name: str) -> None:
    ways = ["own functions"] if family == "gpt_oss" else WAYS  # whose router makes much of any rounding: see below
    for way in ways:
        assert max(rank[f"{family}, {name}, {way}, f32"] for rank in found) < 1e-3


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_learn_as_exactly_as_the_whole_model_does(found, family: str, name: str) -> None:
    """No further from what two steps in f64 learn than twice what the undivided model in f32 is."""
    assert max(rank[f"{family}, {name}, kernels, f64"] for rank in found) < 2 * found[0][f"{family}, whole"] < 1e-2


def test_copies_run_and_do_not_learn(found) -> None:
    for rank in found:
        assert rank["copies"] < TOLERANCE
        assert "copies of experts, which would learn different things" in rank["copies, backward"]


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_implementation_that_transformers_is_told_by_name(found, family: str, name: str) -> None:
    assert max(rank[f"{family}, {name}"] for rank in found) < TOLERANCE


def test_it_is_moeplans(found) -> None:
    layers = len(experts_modules(build("mixtral"))) + len(experts_modules(build("gpt_oss")))
    assert all(rank["calls"] == len(MESHES) * layers for rank in found)


def test_an_expert_implementation_without_a_plan_says_what_to_call() -> None:
    from moeplan.runtime.embedding.layer import planned_forward

    module = next(iter(experts_modules(copy.deepcopy(build("mixtral"))).values()))
    with pytest.raises(MoeplanError, match=r"call moeplan\.transformers\.apply_plan\(model, plan\)"):
        planned_forward(module, torch.zeros(1, 64), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2))

"""Every family's model under a plan, on two ranks, beside the same model as Transformers runs it."""

import copy
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from moeplan.runtime.embedding.form import Form  # noqa: E402
from moeplan.runtime.launch import LocalLauncher  # noqa: E402
from moeplan.spec.plan import LayerPlan  # noqa: E402
from moeplan.tests.small_families import build, families, plan_for  # noqa: E402

PROMPT, DECODE, TOLERANCE = 9, 4, 1e-4
SEQUENCES = (2, 1)  # of each rank
FEWEST = 40


def copies(form: Form) -> LayerPlan:
    """Uneven, with an expert on both ranks."""
    own = tuple(range(2, form.experts))
    return LayerPlan(strategy="ep", slots=((1, 0, 2), own), shares=((1.0, 1.0, 0.25), (0.75, *(1.0 for _ in own[1:]))))


def columns(form: Form) -> LayerPlan:
    first = form.ffn // 3
    return LayerPlan(strategy="sharded", slots=((), ()), split=(first, form.ffn - first))


CASES = {"ep": copies, "sharded": columns}


@torch.no_grad()
def logits(net: torch.nn.Module, prompt: torch.Tensor) -> list[torch.Tensor]:
    """Of a prompt and of four steps with the cache that follow it, the highest token each."""
    out = net(prompt, use_cache=True)
    steps = [out.logits]
    for _ in range(DECODE):
        token = steps[-1][:, -1:].argmax(-1)
        out = net(token, past_key_values=out.past_key_values, use_cache=True)
        steps.append(out.logits)
    return steps


def worst(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(((g - w).abs().max() / w.abs().max()).item() for g, w in zip(got, wanted, strict=True))


def on_rank(rank, job) -> dict[str, object]:
    """Largest error of each family and case, relative to the largest logit; or what it said."""
    from moeplan.transformers import apply_plan

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    found = {}
    for family in job["families"]:
        whole = build(family)
        g = torch.Generator().manual_seed(rank.rank)
        prompt = torch.randint(3, 128, (SEQUENCES[rank.rank], PROMPT), generator=g)
        wanted = logits(whole, prompt)
        for name, layer in CASES.items():
            net = copy.deepcopy(whole)
            apply_plan(net, plan_for(whole, layer))
            found[f"{family}: {name}"] = worst(logits(net, prompt), wanted)
            rank.emit({"family": family, "case": name})
    return found


@pytest.fixture(scope="module")
def errors() -> list[dict[str, float]]:
    job = {"families": families()}
    return LocalLauncher(2).run("moeplan.tests.test_apply_plan_families:on_rank", job, timeout=900)


@pytest.mark.timeout(1200)
def test_all_families_are_there(errors) -> None:
    assert len(errors[0]) == len(families()) * len(CASES) >= FEWEST * len(CASES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", families())
def test_prefill_and_decode_are_the_whole_models(errors, family: str, case: str) -> None:
    assert max(rank[f"{family}: {case}"] for rank in errors) < TOLERANCE

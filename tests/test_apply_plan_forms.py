"""Experts of every form that Transformers has, computed by parts, beside the forward of their own class."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from moeplan.profiler.traces.capture import _experts_modules, _record  # noqa: E402
from moeplan.runtime.embedding.compute import experts_from, kernel_activation  # noqa: E402
from moeplan.runtime.embedding.form import experts_modules, form_of, tensors_of  # noqa: E402
from moeplan.runtime.embedding.part import own_part  # noqa: E402
from moeplan.spec import MoeplanError  # noqa: E402
from moeplan.tests.small_families import build, families, small_config  # noqa: E402

TOKENS, TOP_K = 23, 3
# What none of the causal families has: a norm after each expert; transposed with gate then up and biases.
OTHERS = {
    "muse_spark_text": "muse_spark.modeling_muse_spark:MuseSparkExperts",
    "openai_privacy_filter": "openai_privacy_filter.modeling_openai_privacy_filter:OpenAIPrivacyFilterExperts",
}
CLAMPED = "swiglu_clamped(1.702, 7.0, 1.0)"
KERNELS = {
    "mixtral": "silu",
    "nemotron_h": "relu2",
    "gpt_oss": CLAMPED,
    "aria_text": "silu",
    "minimax_m3_vl_text": CLAMPED,
    "inkling2_text": None,
}
FORMS = [
    "mixtral",
    "nemotron_h",
    "gpt_oss",
    "aria_text",
    "deepseek_v4",
    "minimax_m3_vl_text",
    "inkling2_text",
    "gemma4_text",
    "hy_v4",
]


def module_of(family: str) -> torch.nn.Module:
    """The experts of one layer, with random weights and biases."""
    if family not in OTHERS:
        return next(iter(experts_modules(build(family)).values()))
    module, name = OTHERS[family].split(":")
    experts = getattr(__import__(f"transformers.models.{module}", fromlist=[name]), name)(small_config(family))
    torch.manual_seed(1)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def routed(form, empty: bool = False) -> tuple[torch.Tensor, ...]:
    """x [T, D], ids [T, K], some of none, weights [T, K]; expert 2 is idle."""
    tokens, g = 0 if empty else TOKENS, torch.Generator().manual_seed(3)
    x = torch.randn(tokens, form.hidden, generator=g)
    popularity = torch.tensor([4.0, 1, 0, 1, 1, 1, 1, 1])
    ids = torch.multinomial(popularity.expand(tokens, -1), TOP_K, generator=g) if tokens else torch.zeros(0, TOP_K)
    return x, ids.long(), torch.rand(tokens, TOP_K, generator=g)


@torch.no_grad()
def eager(module: torch.nn.Module, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return type(module).forward.__wrapped__(module, x, ids, weights)


@torch.no_grad()
def by_parts(module, x, ids, weights, parts: list[tuple[list[int], tuple[int, int]]]) -> torch.Tensor:
    """Sum over devices, each with these experts and columns; the first adds the biases of divided columns."""
    form, total = form_of("experts", module), torch.zeros_like(x)
    for number, (experts, columns) in enumerate(parts):
        whole = columns == (0, form.ffn)
        kept = own_part(list(tensors_of(module, form)), form, experts, columns, whole or number == 0)
        local = torch.full((form.experts + 1,), -1)
        local[experts] = torch.arange(len(experts))
        total += experts_from(module, form, kept)(x, local[ids], weights)
    return total


@pytest.mark.parametrize("case", ["f32", "bf16", "no tokens"])
@pytest.mark.parametrize("family", [*FORMS, *OTHERS])
def test_parts_add_up_to_the_class_of_its_own(family: str, case: str) -> None:
    module, dtype = module_of(family), torch.bfloat16 if case == "bf16" else torch.float32
    form = form_of("experts", module)
    x, ids, weights = routed(form, empty=case == "no tokens")
    module, x = module.to(dtype), x.to(dtype)
    # In bf16 the same weights in float32 are right; the class of its own rounds more often.
    wanted = eager(module.float(), x.float(), ids, weights)
    module = module.to(dtype)
    scale = wanted.abs().max().item() if len(x) else 1.0
    everyone, all_columns = list(range(form.experts)), (0, form.ffn)
    divisions = [
        [(everyone, all_columns)],
        [([5, 0, 3], all_columns), ([], all_columns), ([1, 2, 4, 6, 7], all_columns)],
    ]
    if not form.post_norm:
        divisions.append([(everyone, (0, 7)), (everyone, (7, 8)), (everyone, (8, form.ffn))])
    for parts in divisions:
        error = (by_parts(module, x, ids, weights, parts).float() - wanted).abs()
        assert not len(x) or error.max().item() < (1e-5 if dtype == torch.float32 else 3e-2) * scale


def test_the_forms_of_transformers_are_all_here() -> None:
    forms = {form_of("experts", module_of(family))[3:] for family in (*FORMS, *OTHERS)}
    assert {(f[2], f[1], f[3]) for f in forms} == {
        (False, False, True),
        (True, False, True),
        (True, True, False),
        (True, True, True),
    }  # transposed, biases, gate then up
    assert {f[0] for f in forms} == {True, False}  # gated
    assert {f[4] for f in forms} == {True, False}  # a norm after each


@pytest.mark.parametrize(("family", "activation"), KERNELS.items())
def test_kernels_compute_what_is_theirs(family: str, activation: str | None) -> None:
    module = module_of(family)
    assert kernel_activation(module, form_of("experts", module)) == activation


def test_forms_that_changed_are_refused_by_name() -> None:
    module = module_of("mixtral")
    module.scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(MoeplanError, match=r"layer 3\.scale: moeplan does not know what this parameter is for"):
        form_of("layer 3", module)
    module = module_of("mixtral")
    module.gate_up_proj = torch.nn.Parameter(torch.ones(8, 64, 96))
    with pytest.raises(MoeplanError, match=r"layer 3\.gate_up_proj: expected \[8, 96, 64\], got \[8, 64, 96\]"):
        form_of("layer 3", module)
    module.down_proj = torch.nn.Parameter(torch.ones(8, 64, 48, dtype=torch.float8_e4m3fn), requires_grad=False)
    module.gate_up_proj = torch.nn.Parameter(torch.ones(8, 96, 64))
    with pytest.raises(MoeplanError, match=r"down_proj is torch\.float8_e4m3fn: load the model dequantised"):
        form_of("layer 3", module)


@pytest.mark.parametrize("family", families())
def test_the_choice_of_every_family_is_recorded(family: str) -> None:
    """By ``trace capture``: the ids that the experts were called with, of every token and layer."""
    net = build(family)
    if family == "zaya":
        with pytest.raises(MoeplanError, match="tokens that skip their experts"):
            _experts_modules(net)
        return
    seen: list[torch.Tensor] = []
    for module in experts_modules(net).values():
        module.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append([*args, *kwargs.values()][1].reshape(-1, 2)), with_kwargs=True
        )
    sequences = list(torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0)))
    recording = _record(net, sequences, "cpu", None)
    assert recording.experts == 8
    assert recording.ids.shape == (18, len(experts_modules(net)), 2)
    wanted = torch.stack(seen, 1).sort(-1).values
    assert torch.equal(torch.from_numpy(recording.ids).sort(-1).values, wanted)

"""Which activations of Transformers' experts the kernels compute: told by their values."""

import pytest
import torch
from torch import nn

from moeplan.runtime.embedding.activation import activation_of
from moeplan.runtime.embedding.compute import experts_from, kernel_activation
from moeplan.runtime.embedding.form import Form, form_of, tensors_of
from moeplan.runtime.kernels.activation import parse_activation
from moeplan.tests.kernel_cases import error, problem

transformers = pytest.importorskip("transformers")
from transformers.activations import ACT2FN  # noqa: E402

EXPERTS, MODEL, FFN = 5, 16, 24
GATED = Form(EXPERTS, MODEL, FFN, True, False, False, True, False)
# Family, class of its experts, fields of its configuration, the kernels' activation.
MODULES = [
    ("mixtral", "MixtralExperts", {"num_local_experts": EXPERTS, "intermediate_size": FFN}, "silu"),
    ("gpt_oss", "GptOssExperts", {"num_local_experts": EXPERTS, "intermediate_size": FFN}, "swiglu_clamped"),
    (
        "openai_privacy_filter",
        "OpenAIPrivacyFilterExperts",
        {"num_local_experts": EXPERTS, "intermediate_size": FFN},
        "swiglu_clamped",
    ),
    (
        "deepseek_v4",
        "DeepseekV4Experts",
        {"n_routed_experts": EXPERTS, "moe_intermediate_size": FFN, "swiglu_limit": 0.5},
        "swiglu_clamped(1.0, 0.5, 0.0)",
    ),
    (
        "nemotron_h",
        "NemotronHExperts",
        {"n_routed_experts": EXPERTS, "moe_intermediate_size": FFN, "mlp_hidden_act": "relu2"},
        "relu2",
    ),
    ("aria", "AriaExperts", {"moe_num_experts": EXPERTS, "intermediate_size": FFN}, "silu"),
]


def built(family: str, name: str, fields: dict) -> nn.Module:
    module = __import__(f"transformers.models.{family}.modeling_{family}", fromlist=[name])
    kind = "aria_text" if family == "aria" else family
    made = transformers.AutoConfig.for_model(kind, hidden_size=MODEL, num_attention_heads=4, **fields)
    made._experts_implementation = "eager"
    experts = getattr(module, name)(made)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return experts


@pytest.mark.parametrize(("family", "name", "fields", "activation"), MODULES, ids=[m[0] for m in MODULES])
def test_the_kernels_give_what_the_module_gives(family: str, name: str, fields: dict, activation: str) -> None:
    module = built(family, name, fields)
    form = form_of(name, module)
    got = kernel_activation(module, form)
    assert got is not None
    assert parse_activation(got) == parse_activation(activation)
    p = problem(11, EXPERTS, 2, MODEL)
    ids = p.ids.clamp(min=0)  # theirs has no choice that is not here
    with torch.no_grad():
        want = module(3 * p.x, ids, p.weights)
        y = experts_from(module, form, list(tensors_of(module, form)))(3 * p.x, ids, p.weights)
    assert error(y, want) < 1e-5


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("silu", "silu"),
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("quick_gelu", None),
        ("gelu_10", None),
        ("mish", None),
        ("xielu", None),
        ("tanh", None),
    ],
)
def test_activations_are_told_apart(name: str, activation: str | None) -> None:
    module = nn.Module()
    module.act_fn = ACT2FN[name]
    assert activation_of(module, GATED._replace(gated=False)) == activation


@pytest.mark.parametrize("limit", [0.1, 1.0, 7.0])
def test_another_gate_is_none_of_the_kernels(limit: float) -> None:
    """Clamped after the activation, as in Step-3.7: not the clamps that the kernels have."""

    class After(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.limit = limit

        def _apply_gate(self, gate_up):
            gate, up = gate_up.chunk(2, dim=-1)
            return nn.functional.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)

    assert activation_of(After(), GATED) is None


def test_a_norm_after_the_experts_is_the_modules_own() -> None:
    module = nn.Module()
    module.act_fn = ACT2FN["relu2"]
    assert kernel_activation(module, GATED._replace(gated=False, post_norm=True)) is None

"""gpt-oss's layout: packed weights give what Transformers' own experts give; wrong shapes are named."""

import pytest
import torch

from moeplan.runtime.kernels import expert_ffn, pack_interleaved
from moeplan.spec import MoeplanError
from moeplan.tests.kernel_cases import error, problem

transformers = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")


def experts(model: int, ffn: int, count: int):
    sizes = {"hidden_size": model, "intermediate_size": ffn, "num_local_experts": count}
    module = transformers.GptOssExperts(transformers.GptOssConfig(**sizes, experts_implementation="eager"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return module


def test_packed_weights_give_what_transformers_experts_give():
    module, p = experts(16, 24, 5), problem(11, 5, 2, 16)
    with torch.no_grad():
        packed = pack_interleaved(module.gate_up_proj, module.down_proj, gate_up_proj_bias=module.gate_up_proj_bias)
        ids = p.ids.clamp(min=0)  # theirs has no choice that is not here
        want = module(p.x, ids, p.weights)
        y = expert_ffn(
            p.x,
            packed.gate_up,
            packed.down,
            ids,
            p.weights,
            activation="swiglu_clamped",
            gate_up_bias=packed.gate_up_bias,
            down_bias=module.down_proj_bias,
        )
    assert error(y, want) < 1e-5
    parts = (module.gate_up_proj, module.down_proj, module.gate_up_proj_bias)
    assert packed.bytes == sum(part.nbytes for part in parts)
    assert pack_interleaved(module.gate_up_proj, module.down_proj).gate_up_bias is None


def test_shapes_that_do_not_go_together_are_named():
    gate_up, down = torch.zeros(3, 8, 12), torch.zeros(3, 6, 8)
    for name, got, arguments in (
        ("gate_up_proj", r"\[E, D, 2 H\], got \[3, 8, 11\]", (gate_up[..., :11], down, None)),
        ("gate_up_proj", r"\[E, D, 2 H\], got \[8, 12\]", (gate_up[0], down, None)),
        ("down_proj", r"\[3, 6, 8\], got \[3, 8, 6\]", (gate_up, down.transpose(1, 2), None)),
        ("gate_up_proj_bias", r"\[3, 12\], got \[3, 6\]", (gate_up, down, torch.zeros(3, 6))),
    ):
        with pytest.raises(MoeplanError, match=f"^pack_interleaved: {name}: expected {got}$"):
            pack_interleaved(*arguments[:2], gate_up_proj_bias=arguments[2])

#!/usr/bin/env bash
# DeepSpeed 0.19.8 with Transformers 5.23.0: AutoEP meets gpt-oss without a preset and stops, naming the remedy: "Set
# expert_parallel.expert_activation to ... swiglu_oai for ... (GPT-OSS, MiniMax-M3)". One expects that a model set up so
# computes what it computed. It does not, and nothing says so:
# - repack_expert_weights takes gate and up as the two halves of gate_up_proj, where gpt-oss interleaves them;
# - the experts' biases (gate_up_proj_bias, down_proj_bias) are left behind: only three matrices are repacked.
# Seen: "stops and names swiglu_oai: True", "gate is the first half: True, the even columns: False",
# "parameters of the experts: [down_proj, down_proj_bias, gate_up_proj, gate_up_proj_bias], repacked: 3 matrices",
# "relative error of the experts' output: 1.70".
# Exits non-zero if the behaviour changes. Needs a build of torch 2.13.0 without CUDA from the configured index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/pip" --quiet --disable-pip-version-check)
# torch first and by itself: a CPU build (PyPI's has CUDA, PyTorch's own index has the small one).
"${pip[@]}" install "${TORCH:-torch==2.13.0}" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
"${pip[@]}" install transformers==5.23.0
"${pip[@]}" install hjson==3.1.0 py-cpuinfo==9.0.0 psutil==7.2.2 einops==0.8.2 msgpack==1.2.4 tqdm==4.70.1 \
    ninja==1.13.2 pydantic setuptools
DS_BUILD_OPS=0 "${pip[@]}" install --no-deps --no-build-isolation deepspeed==0.19.8
cat > "$folder/check.py" <<'PY'
import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.moe.ep_repack import repack_expert_weights
from transformers import GptOssConfig, GptOssForCausalLM

torch.manual_seed(0)
config = GptOssConfig(
    hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, vocab_size=64, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1,
)
model = GptOssForCausalLM(config)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.5)
section = {
    "enabled": True, "autoep_size": 1, "moe_layer_pattern": r"model\.layers\.\d+\.mlp", "router_pattern": "router",
    "expert_pattern": "experts", "num_experts_attr": "num_local_experts",
}
try:
    AutoEP(model, parse_autoep_config(section)).ep_parser()
    raise SystemExit("changed: no stop without an activation")
except ValueError as error:
    named = "swiglu_oai" in str(error) and "GPT-OSS" in str(error)
print("stops and names swiglu_oai:", named)

(spec,) = AutoEP(model, parse_autoep_config(section | {"expert_activation": "swiglu_oai"})).ep_parser()
experts = model.model.layers[0].mlp.experts
gate, down, up = repack_expert_weights(experts, spec, 0, 1)
packed = experts.gate_up_proj
half = torch.equal(gate, packed[:, :, :16].transpose(1, 2))
even = torch.equal(gate, packed[:, :, ::2].transpose(1, 2))
print(f"gate is the first half: {half}, the even columns: {even}")
names = sorted(name for name, _ in experts.named_parameters())
print("parameters of the experts:", names, "repacked: 3 matrices")

x = torch.randn(5, 32)
everything = torch.arange(4).repeat(5, 1)
with torch.no_grad():  # every token through every expert, each with weight 1/4
    own = experts(x, everything, torch.full((5, 4), 0.25)).view(5, 32)
    g = torch.einsum("td,efd->etf", x, gate).clamp(max=7.0)
    u = torch.einsum("td,efd->etf", x, up).clamp(-7.0, 7.0)
    act = (u + 1) * g * torch.sigmoid(1.702 * g)
    theirs = torch.einsum("etf,edf->etd", act, down).mean(0)
error = float((theirs - own).norm() / own.norm())
print(f"relative error of the experts' output: {error:.2f}")
raise SystemExit(0 if named and half and not even and len(names) == 4 and error > 0.5 else "changed")
PY
"$folder/venv/bin/python" "$folder/check.py" 2>&1 | grep -v -i "warning\|setting accelerator"

#!/usr/bin/env bash
# Transformers 5.23.0 (accelerate 1.15.0, torch 2.13.0, CPU): block-fp8 weights whose rows or columns are no multiple of
# the block are dequantised with other blocks than they were quantised with, silently.
#
# `weight_block_size` [128, 128] means blocks that begin at row and column 0; the last one is cut off: 192 rows have
# scales for rows 0-127 and 128-191. This is how DeepSeek-V3 is published (kv_a_proj_with_mqa: 576 rows, 5 rows of
# scales), and how DeepSeek's own dequantisation, vLLM and SGLang read it. Transformers ignores the configured block and
# divides the rows evenly by the number of scales: 192 rows become two blocks of 96, so rows 96-127 get the scale of
# their neighbours. Where rows do not divide by the number of scales (576 by 5), loading is refused.
#
# A good engineer would expect the published layout to load right, or not at all.
#
# Seen (Qwen3-MoE of one layer, experts of 192 columns, loaded without an option on a machine without a GPU):
#   blocks of 128 rows, cut off at 192:   largest error of a weight 0.0000 (by hand)
#   Transformers, dequantised at loading: rows 96-127 are 16.0 times too large, the others exact
#
# Exits 1 if Transformers' behaviour has changed.
set -euo pipefail
# PYTHON: an interpreter with torch and what Transformers depends on; packages are installed beside it, not into it.
PYTHON=${PYTHON:-$(dirname "$0")/../.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work/site" \
    transformers==5.23.0 accelerate==1.15.0 psutil==7.2.2

cat > "$work/seen.py" <<'PYTHON_END'
import json, pathlib, sys
import torch, transformers
from safetensors.torch import load_file, save_file

folder = pathlib.Path(sys.argv[1])
transformers.logging.set_verbosity_error()
config = transformers.Qwen3MoeConfig(
    vocab_size=64, hidden_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=64,
    num_experts=2, num_experts_per_tok=1, moe_intermediate_size=192, intermediate_size=192,
    pad_token_id=None, bos_token_id=None, eos_token_id=None,
)
transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
name = "model.layers.0.mlp.experts.0.up_proj.weight"
tensors, wanted = load_file(folder / "model.safetensors"), None
for key in [k for k in tensors if k.endswith("_proj.weight")]:
    rows, columns = tensors[key].shape
    values = torch.ones(rows, columns, dtype=torch.float8_e4m3fn)
    # One scale per block of 128 x 128: 1/4 in the upper row of blocks, 4 in the lower one.
    scales = torch.full((-(-rows // 128), -(-columns // 128)), 0.25)
    scales[1:] = 4
    tensors[key], tensors[key + "_scale_inv"] = values, scales
    if key == name:
        wanted = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
body = json.loads((folder / "config.json").read_text())
body["quantization_config"] = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
}
(folder / "config.json").write_text(json.dumps(body))
loaded = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, quantization_config=transformers.FineGrainedFP8Config(dequantize=True)
)
got = loaded.model.layers[0].mlp.experts.gate_up_proj[0, 192:]  # the rows of up
ratio = (got / wanted).amax(1)
wrong = (ratio != 1).nonzero().flatten().tolist()
print(f"Transformers {transformers.__version__}: wrong rows {wrong[:1]} to {wrong[-1:]}, factor {ratio.max().item()}")
sys.exit(0 if wrong == list(range(96, 128)) and ratio.max() == 16 else 1)
PYTHON_END
PYTHONPATH="$work/site" "$PYTHON" -W ignore "$work/seen.py" "$work/model"

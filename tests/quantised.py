"""Quantised checkpoints for tests, and their values computed by float64 loops that share nothing with the product."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Parts = dict[str, torch.Tensor]
Quantise = Callable[[str, torch.Tensor], Parts]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
BLOCK_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def compressed(strategy: str, kind: str, symmetric: bool = True, **weights) -> dict:
    """A ``quantization_config`` as llm-compressor writes it."""
    layout = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": symmetric, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": layout, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def quantise(weight: torch.Tensor, block: tuple[int, int], dtype: torch.dtype, zero_points: bool = False):
    """values, scales [r, c] and zero points (or None) of blocks that begin at row and column 0."""
    rows, columns = weight.shape
    grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    values, scales = torch.empty(rows, columns, dtype=dtype), torch.empty(grid)
    zeros = torch.zeros(grid, dtype=torch.int8) if zero_points else None
    top = 448.0 if dtype == torch.float8_e4m3fn else 127.0
    for i in range(grid[0]):
        for j in range(grid[1]):
            span = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            part = weight[span]
            if zeros is None:
                scales[i, j] = part.abs().max() / top
                scaled = part / scales[i, j]
            else:
                scales[i, j] = (part.max() - part.min()) / 255
                zeros[i, j] = torch.round(-128 - part.min() / scales[i, j]).clamp(-128, 127)
                scaled = part / scales[i, j] + zeros[i, j]
            values[span] = scaled.to(dtype) if top == 448 else scaled.round().clamp(-128, 127).to(dtype)
    return values, scales, zeros


def exact(
    values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, block: tuple[int, int]
) -> torch.Tensor:
    """float64 [R, C], one element at a time."""
    v, s = values.double().tolist(), scales.double().tolist()
    z = zeros.double().tolist() if zeros is not None else None
    out = []
    for i, row in enumerate(v):
        a = i // block[0]
        out.append([(x - (z[a][j // block[1]] if z else 0.0)) * s[a][j // block[1]] for j, x in enumerate(row)])
    return torch.tensor(out, dtype=torch.float64)


def block_fp8(name: str, weight: torch.Tensor) -> Parts:
    values, scales, _ = quantise(weight, (128, 128), torch.float8_e4m3fn)
    return {name: values, f"{name}_scale_inv": scales}


def per(
    strategy: str, dtype: torch.dtype, scale_dtype: torch.dtype = torch.float32, zero_points: bool = False
) -> Quantise:
    """compressed-tensors' weight, weight_scale and weight_zero_point."""

    def parts(name: str, weight: torch.Tensor) -> Parts:
        block = (1, weight.shape[1]) if strategy == "channel" else tuple(weight.shape)
        values, scales, zeros = quantise(weight, block, dtype, zero_points)
        shape = (-1, 1) if strategy == "channel" else (1,)
        found = {name: values, f"{name}_scale": scales.reshape(shape).to(scale_dtype)}
        return found | ({f"{name}_zero_point": zeros.reshape(shape)} if zeros is not None else {})

    return parts


def quantise_folder(folder: Path, parts: Quantise, config: dict | None) -> None:
    """Replace the projections of a folder that Transformers saved, and say so in its config.json."""
    file = folder / "model.safetensors"
    tensors: Parts = {}
    for name, tensor in load_file(file).items():
        projection = name.endswith(".weight") and name.split(".")[-2] in PROJECTIONS
        tensors |= parts(name, tensor) if projection else {name: tensor}
    save_file(tensors, file, metadata={"format": "pt"})
    body = json.loads((folder / "config.json").read_text())
    if config is not None:
        body["quantization_config"] = config
    (folder / "config.json").write_text(json.dumps(body))


def write_folder(folder: Path, tensors: Parts, config: dict | None) -> Path:
    """A folder with these tensors and nothing in its config.json but the quantisation."""
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config} if config else {}))
    return folder

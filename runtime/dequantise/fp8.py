"""``quant_method`` "fp8": float8_e4m3 weights with a scale per block (DeepSeek, Qwen3-FP8) or per tensor.

``weight_scale_inv`` [ceil(out / rows), ceil(in / columns)] multiplies its block; blocks at the right and lower edge are
cut off, not stretched. vLLM's older per-tensor files call the single factor ``weight_scale``. Fused experts, as
Transformers saves them, have ``gate_up_proj`` [E, 2 H, D] and ``gate_up_proj_scale_inv``, blocks counted per expert.
"""

from ...spec.errors import DocumentError
from ...spec.quantization import Quantization
from ..tensors import PLAIN, Stored, TensorFolder
from .scaled import Layout, check_grid, scale_names

EXPONENTS = ("F8_E8M0",)


def layout(folder: TensorFolder, quantization: Quantization, name: str, stored: Stored) -> Layout:
    """Raises DocumentError for another dtype, missing scales or a grid of another shape."""
    where = f"{folder.folder}: {name}"
    if stored.dtype != "F8_E4M3" or len(stored.shape) < 2:
        raise DocumentError(f"{where}: fp8 weights are matrices of F8_E4M3, got {stored.dtype} {list(stored.shape)}")
    if quantization.ignores(name.removesuffix(".weight")):
        raise DocumentError(f"{where}: stored as F8_E4M3, but config.json lists it as not quantised")
    *experts, rows, columns = stored.shape
    found = [n for n in scale_names(name) if n in folder]
    scale = found[0] if found else scale_names(name)[0]
    block = quantization.formats[0].block
    if block is None or not scale.endswith("_scale_inv"):
        single: list[list[int]] = [[*experts, 1, 1], experts] if experts else [[], [1], [1, 1]]
        check_grid(folder, scale, single, PLAIN)
        return Layout(scale, None, (rows, columns))
    check_grid(folder, scale, [[*experts, -(-rows // block[0]), -(-columns // block[1])]], PLAIN + EXPONENTS)
    return Layout(scale, None, block)

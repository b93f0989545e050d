"""compressed-tensors with weights that are not packed: ``float-``, ``int-`` and ``naive-quantized``.

``weight`` is float8_e4m3 or int8, ``weight_scale`` [1] (tensor), [out, 1] (channel), [out, in / group] (group) or
[ceil(out / rows), ceil(in / columns)] (block); ``weight_zero_point`` on the same grid is subtracted first. Its presence
is optional for symmetric weights.
"""

from ...spec.errors import DocumentError
from ...spec.quantization import Quantization, WeightFormat
from ..tensors import PLAIN, Stored, TensorFolder
from .scaled import Layout, check_grid

UNPACKED = ("float-quantized", "int-quantized", "naive-quantized")
INTEGERS = ("I8", "I32", "I64", *PLAIN)


def unpacked(quantization: Quantization) -> bool:
    """Whether every weight is stored as one number per element, with all that is needed to scale it."""
    if not quantization.formats:
        return False
    if quantization.scheme != "compressed-tensors":
        return all(f.bits == 8 for f in quantization.formats)  # not fp4 of experts
    kinds = {(f.type, f.bits) for f in quantization.formats}
    known = all(kind == ("float", 8) or (kind[0] == "int" and kind[1] <= 8) for kind in kinds)
    return known and all(f.storage in UNPACKED for f in quantization.formats)


def layout(folder: TensorFolder, quantization: Quantization, name: str, stored: Stored) -> Layout:
    """Raises DocumentError for a tensor that the configuration does not cover, and for scales that do not fit."""
    where, stem = f"{folder.folder}: {name}", name.removesuffix(".weight")
    covered = quantization.format_of(stem)
    if covered is None or stem == name or len(stored.shape) != 2:
        raise DocumentError(f"{where}: stored as {stored.dtype}, but config.json does not list it as quantised")
    wanted = "F8_E4M3" if covered.type == "float" else "I8"
    if stored.dtype != wanted:
        raise DocumentError(f"{where}: expected {wanted}, got {stored.dtype}")
    if f"{name}_g_idx" in folder:
        raise DocumentError(f"{where}: its columns are in activation order (weight_g_idx), which is not read")
    block, shapes = _grid(covered, stored, where)
    check_grid(folder, f"{name}_scale", shapes, PLAIN)
    zero = f"{name}_zero_point"
    if zero in folder or not covered.symmetric:
        check_grid(folder, zero, shapes, INTEGERS if covered.type == "int" else (*PLAIN, "F8_E4M3"))
        return Layout(f"{name}_scale", zero, block)
    return Layout(f"{name}_scale", None, block)


def _grid(covered: WeightFormat, stored: Stored, where: str) -> tuple[tuple[int, int], list[list[int]]]:
    """Block of one scale, and the shapes that the tensor of scales may have."""
    rows, columns = stored.shape
    if covered.block is None:
        if covered.strategy == "tensor":
            return (rows, columns), [[1], [], [1, 1]]
        return (1, columns), [[rows, 1], [rows]]
    if covered.strategy == "group" and columns % covered.block[1]:
        raise DocumentError(f"{where}: {columns} columns are no multiple of the group size {covered.block[1]}")
    return covered.block, [[-(-rows // covered.block[0]), -(-columns // covered.block[1])]]

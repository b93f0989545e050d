"""Weights as numbers, whatever scheme a checkpoint stores them in.

One file per scheme. A reader gives any region of a tensor as floating point; what it cannot give exactly it refuses by
the scheme's or the tensor's name, never by a cast.
"""

from pathlib import Path

from ...spec.document import parse_object, read_text
from ...spec.errors import MoeplanError
from ...spec.quantization import HF_QUANT_CONFIG, Quantization, read_quantization
from ..tensors import TensorFolder
from . import compressed_tensors, fp8
from .scaled import ScaledReader

READ = "block and per-tensor fp8, compressed-tensors with 8-bit weights that are not packed, mxfp4 of gpt-oss"

__all__ = ["ScaledReader", "folder_quantization", "open_reader"]


def folder_quantization(folder: Path) -> Quantization | None:
    """The scheme that the folder's own ``config.json`` (and ``hf_quant_config.json``) names; None where none does."""
    bodies = []
    for name in ("config.json", HF_QUANT_CONFIG):
        path = folder / name
        bodies.append(parse_object(read_text(path), str(path)) if path.is_file() else None)
    return read_quantization(bodies[0] or {}, bodies[1], str(folder / "config.json"))


def open_reader(folder: TensorFolder) -> ScaledReader:
    """A reader for the scheme of this folder.

    Raises MoeplanError that names the scheme where it cannot be read exactly, DocumentError for a malformed config.
    """
    quantization = folder_quantization(folder.folder)
    if quantization is None or not quantization.weights:
        return ScaledReader(folder, None, None)
    if quantization.scheme == "mxfp4":
        return ScaledReader(folder, quantization, None)
    for scheme, layout in (("fp8", fp8.layout), ("compressed-tensors", compressed_tensors.layout)):
        if quantization.scheme == scheme and compressed_tensors.unpacked(quantization):
            return ScaledReader(folder, quantization, layout)
    raise MoeplanError(
        f"{folder.folder}: the weights are quantised with {quantization.name}, which moeplan does not dequantise "
        f"(it reads {READ}): give a checkpoint in bf16, f16 or f32"
    )

"""Integers or 8-bit floats times a scale per tensor, row, group or block: the arithmetic that schemes share."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...spec.errors import DocumentError
from ...spec.quantization import Quantization
from ..tensors import PLAIN, Region, Stored, TensorFolder

# What a scheme stores beside or instead of ``X.weight``: named where a plain weight was expected.
BESIDE = ("weight_scale_inv", "weight_scale", "weight_scale_2", "qscale_weight", "SCB", "weight.absmax")
INSTEAD = {
    "weight_packed": "packed by compressed-tensors",
    "qweight": "packed by gptq or awq",
    "weight_blocks": "mxfp4 blocks",
    "W_q": "packed by hqq",
    "codes": "packed by aqlm",
}


class Layout(NamedTuple):
    """Where a weight's scales are: grid entry [i, j] covers rows i * block[0] and columns j * block[1] onwards.

    zero: the tensor of zero points, on the same grid, or None.
    """

    scale: str
    zero: str | None
    block: tuple[int, int]


# (folder, quantization, name, what is stored) -> the layout; raises DocumentError where it does not fit the scheme.
FindLayout = Callable[[TensorFolder, Quantization, str, Stored], Layout]


class ScaledReader:
    """Tensors of a folder as floating point. ``dry``: everything but the data is checked, tensors are on "meta".

    Raises DocumentError, which names the tensor, for a dtype or scales that do not fit the folder's scheme.
    """

    def __init__(self, folder: TensorFolder, quantization: Quantization | None, find: FindLayout | None) -> None:
        self.folder, self.quantization, self._find = folder, quantization, find
        self.dry = False

    def __contains__(self, name: str) -> bool:
        return name in self.folder

    def layout(self, name: str, shape: Sequence[int]) -> Layout | None:
        """How the tensor is scaled; None where it is stored in a plain dtype. Reads no data but dtypes and shapes."""
        where = f"{self.folder.folder}: {name}"
        if name not in self.folder:
            raise DocumentError(f"{self.folder.folder}: tensor {name} is missing{self._stored_instead(name)}")
        stored = self.folder.check(name, shape)
        if stored.dtype in PLAIN:
            beside = next((n for n in scale_names(name) if n in self.folder), None)
            if beside is not None:
                raise DocumentError(f"{where}: stored as {stored.dtype}, yet {beside} scales it: one of them is wrong")
            return None
        if self.quantization is None:
            raise DocumentError(
                f"{where}: stored as {stored.dtype}, but no quantization_config of config.json says what that means"
            )
        if self._find is None:
            raise DocumentError(f"{where}: stored as {stored.dtype}, which {self.quantization.name} does not explain")
        return self._find(self.folder, self.quantization, name, stored)

    def read(self, name: str, shape: Sequence[int], region: Region | None = None) -> Tensor:
        """The tensor, or a region of it, as it is (plain) or dequantised (float32). shape: of the whole tensor."""
        layout = self.layout(name, shape)
        region = tuple(region) if region is not None else tuple((0, n) for n in shape)
        if self.dry:
            return torch.empty([last - first for first, last in region], device="meta")
        raw = self.folder.read(name, region)
        if layout is None:
            return raw
        scale = self._grid(layout.scale, layout.block, shape, region)
        zero = self._grid(layout.zero, layout.block, shape, region) if layout.zero else None
        if not torch.isfinite(scale).all():
            raise DocumentError(f"{self.folder.folder}: {layout.scale}: holds values that are not finite")
        return dequantise(raw, scale, zero, layout.block, (region[-2][0], region[-1][0]))

    def _grid(self, name: str, block: tuple[int, int], shape: Sequence[int], region: Region) -> Tensor:
        """The entries that cover a region, as float32 [..., rows of blocks, columns of blocks]."""
        blocks = [-(-n // b) for n, b in zip(shape[-2:], block, strict=True)]
        whole = as_float(self.folder.read(name)).reshape(*shape[:-2], *blocks)
        leading = tuple(slice(first, last) for first, last in region[:-2])
        spans = tuple(slice(first // b, -(-last // b)) for (first, last), b in zip(region[-2:], block, strict=True))
        return whole[leading + spans]

    def _stored_instead(self, name: str) -> str:
        stem = name.removesuffix(".weight")
        found = next((suffix for suffix in INSTEAD if f"{stem}.{suffix}" in self.folder), None)
        return f": {stem}.{found} is there, {INSTEAD[found]}" if found else ""


def scale_names(name: str) -> list[str]:
    """Names under which a scheme might keep the scales of ``X.weight``, or of a parameter without that ending."""
    if name.endswith(".weight"):
        return [f"{name.removesuffix('.weight')}.{suffix}" for suffix in BESIDE]
    return [f"{name}_scale_inv", f"{name}_scale"]


def as_float(scale: Tensor) -> Tensor:
    """Scales or zero points as float32. Bytes that stand for exponents arrive as float8_e8m0fnu: powers of two."""
    return scale.to(torch.float32)


def dequantise(
    raw: Tensor, scale: Tensor, zero: Tensor | None, block: tuple[int, int], first: tuple[int, int]
) -> Tensor:
    """(raw - zero) * scale in float32; one rounding, the product's.

    raw: [..., R, C], a region that begins at row and column ``first``; scale, zero: float32 [..., r, c], the entries of
    the grid that cover this region.
    """
    size = tuple(raw.shape[-2:])

    def spread(grid: Tensor) -> Tensor:
        for dim, count, b, begin in zip((-2, -1), size, block, first, strict=True):
            if grid.shape[dim] > 1:
                grid = grid.repeat_interleave(b, dim).narrow(dim, begin % b, count)
        return grid

    values = raw.to(torch.float32)
    if zero is not None:
        values -= spread(zero)
    return values.mul_(spread(scale))


def check_grid(folder: TensorFolder, name: str, wanted: Sequence[Sequence[int]], dtypes: Sequence[str]) -> None:
    """Raise DocumentError unless scales (or zero points) exist with one of these shapes and dtypes."""
    if name not in folder:
        raise DocumentError(f"{folder.folder}: tensor {name} is missing: without it the weight's values are not known")
    stored = folder.stored(name)
    if list(stored.shape) not in [list(shape) for shape in wanted]:
        shapes = " or ".join(str(list(shape)) for shape in wanted)
        raise DocumentError(f"{folder.folder}: {name}: expected shape {shapes}, got {list(stored.shape)}")
    if stored.dtype not in dtypes:
        raise DocumentError(f"{folder.folder}: {name}: expected {' or '.join(dtypes)}, got {stored.dtype}")

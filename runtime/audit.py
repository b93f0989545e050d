"""Stored weights computed again, one value at a time, from the bytes of the files and nothing else.

A run and its reference read weights through the same loader, so neither shows a fault of it. This reads headers,
dtypes, scales and the configuration by code of its own, in Python's floats, and shares only what the formats' documents
say: safetensors' layout, IEEE 754 and OCP's 8-bit floats, blocks that begin at row and column 0.
"""

import json
import math
import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..spec.errors import DocumentError

TENSORS, VALUES = 96, 16  # sampled per layer, and of each
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}
_PACKED = {"F64": "<d", "F32": "<f", "F16": "<e", "I8": "<b", "U8": "<B", "I32": "<i", "I64": "<q"}


class _Entry(NamedTuple):
    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int


class Audit:
    """The tensors of a folder by their bytes.

    Raises DocumentError for headers that are not safetensors'.
    """

    def __init__(self, folder: Path) -> None:
        config = _object(folder / "config.json")
        self._config = config.get("quantization_config") or config.get("compression_config") or {}
        index = _object(folder / "model.safetensors.index.json").get("weight_map")
        files = sorted(set(index.values())) if index else ["model.safetensors"]
        self.entries: dict[str, _Entry] = {}
        for file in files:
            self.entries |= _header(folder / Path(file).name)

    def names(self, layer: int, seed: int) -> list[str]:
        """Some matrices of a layer, drawn by ``seed``."""
        prefix = f"model.layers.{layer}."
        known = [n for n, e in self.entries.items() if n.startswith(prefix) and len(e.shape) == 2 and _is_weight(n, e)]
        known.sort()
        return random.Random(seed + layer).sample(known, min(TENSORS, len(known)))

    def value(self, name: str, at: Sequence[int]) -> float:
        """One element as the number that it stands for."""
        entry = self.entries[name]
        stored = self._element(name, at)
        if entry.dtype in ("F64", "F32", "F16", "BF16"):
            return stored
        stem = name.removesuffix("weight")
        scale = next((f"{stem}{s}" for s in ("weight_scale_inv", "weight_scale") if f"{stem}{s}" in self.entries), None)
        if scale is None:
            raise DocumentError(f"{entry.path}: {name}: no scales")
        place = self._place(name, scale, at)
        zero = f"{stem}weight_zero_point"
        return (stored - (self._element(zero, place) if zero in self.entries else 0.0)) * self._element(scale, place)

    def _place(self, name: str, scale: str, at: Sequence[int]) -> tuple[int, ...]:
        """Where in the grid of scales an element's own one is."""
        grid, (rows, columns) = self.entries[scale].shape, self.entries[name].shape
        if math.prod(grid) == 1:
            return tuple(0 for _ in grid)
        if grid in ((rows,), (rows, 1)):
            return (at[0], 0)[: len(grid)]
        for height, width in self._blocks():
            if grid == (math.ceil(rows / height), math.ceil(columns / width)):
                return at[0] // height, at[1] // width
        raise DocumentError(f"{self.entries[scale].path}: {scale}: no block of the configuration gives {list(grid)}")

    def _blocks(self) -> list[tuple[int, int]]:
        found = [tuple(self._config.get("weight_block_size") or (128, 128))]
        for group in (self._config.get("config_groups") or {}).values():
            weights = group.get("weights") or {}
            if weights.get("block_structure"):
                found.append(tuple(weights["block_structure"]))
            elif (weights.get("group_size") or -1) > 0:
                found.append((1, weights["group_size"]))
        return found

    def _element(self, name: str, at: Sequence[int]) -> float:
        entry = self.entries[name]
        offset = 0
        for position, size in zip(at, entry.shape, strict=True):
            offset = offset * size + position
        size = _SIZES[entry.dtype]
        with open(entry.path, "rb") as file:
            file.seek(entry.begin + offset * size)
            return decode(entry.dtype, file.read(size))


def decode(dtype: str, data: bytes) -> float:
    """One little-endian element of a safetensors dtype."""
    if dtype == "BF16":
        return struct.unpack("<f", b"\0\0" + data)[0]
    if dtype == "F8_E8M0":
        return math.ldexp(1.0, data[0] - 127) if data[0] != 255 else math.nan
    if dtype == "F8_E4M3":
        sign, exponent, mantissa = -1.0 if data[0] & 128 else 1.0, (data[0] >> 3) & 15, data[0] & 7
        if exponent == 15 and mantissa == 7:
            return math.nan
        return sign * (math.ldexp(mantissa, -9) if exponent == 0 else math.ldexp(8 + mantissa, exponent - 10))
    return float(struct.unpack(_PACKED[dtype], data)[0])


def _is_weight(name: str, entry: _Entry) -> bool:
    return name.endswith(".weight") and entry.dtype in _SIZES and math.prod(entry.shape) > 0


def _object(path: Path) -> Mapping[str, Any]:
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise DocumentError(f"{path}: not JSON ({error})") from None
    return body if isinstance(body, Mapping) else {}


def _header(path: Path) -> dict[str, _Entry]:
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            body = json.loads(file.read(length))
        return {
            name: _Entry(path, found["dtype"], tuple(found["shape"]), 8 + length + found["data_offsets"][0])
            for name, found in body.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, struct.error, RecursionError) as error:
        raise DocumentError(f"{path}: not a readable safetensors file ({error})") from None

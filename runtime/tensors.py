"""The tensors of a folder of safetensors: one file, or shards with an index. Only what is asked for is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..spec.errors import DocumentError
from ..spec.files import open_regular, read_text
from ..spec.texts import parse_object
from .weights import Range

Region = Sequence[Range]  # [first, last) of every dimension
PLAIN = ("F64", "F32", "F16", "BF16")  # dtypes whose values are the weights


class Stored(NamedTuple):
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]


class TensorFolder:
    """Tensors by name, whichever shard holds them.

    Raises DocumentError for files that are missing or unreadable and for tensors that no file holds.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = _tensor_files(self.folder)
        self._open: dict[str, Any] = {}
        self._stored: dict[str, Stored] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def lazy(self, name: str) -> Any:
        """A tensor that is read when it is indexed, as safetensors has it."""
        file = self.files.get(name)
        if file is None:
            raise DocumentError(f"{self.folder}: tensor {name} is missing")
        try:
            if file not in self._open:
                self._open[file] = safe_open(_regular(self.folder / file), framework="pt")
            return self._open[file].get_slice(name)
        except (OSError, SafetensorError) as error:
            raise DocumentError(f"{self.folder / file}: not a readable safetensors file ({error})") from None

    def stored(self, name: str) -> Stored:
        """dtype and shape, without the data."""
        if name not in self._stored:
            found = self.lazy(name)
            self._stored[name] = Stored(str(found.get_dtype()), tuple(found.get_shape()))
        return self._stored[name]

    def check(self, name: str, shape: Sequence[int]) -> Stored:
        """Raise DocumentError where the tensor is missing or has another shape."""
        stored = self.stored(name)
        if stored.shape != tuple(shape):
            raise DocumentError(f"{self.folder}: {name}: expected shape {list(shape)}, got {list(stored.shape)}")
        return stored

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """The values as they are stored, on the CPU: the whole tensor or a region of it."""
        found = self.lazy(name)
        try:
            if region is None or not region:
                return self._open[self.files[name]].get_tensor(name)
            if any(first == last for first, last in region):  # safetensors has no empty slices
                like = found[tuple(slice(0, 1) for _ in region)]
                return torch.empty([last - first for first, last in region], dtype=like.dtype)
            return found[tuple(slice(first, last) for first, last in region)]
        except (OSError, SafetensorError) as error:
            raise DocumentError(f"{self.folder}: {name}: cannot be read ({error})") from None


def _tensor_files(folder: Path) -> dict[str, str]:
    """File name of every tensor. Names in an index must be plain file names: nothing outside the folder is opened."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    try:
        if index.exists():
            where = parse_object(read_text(index), str(index))["weight_map"]
            for file in set(where.values()):
                if Path(file).name != file or not file.endswith(".safetensors"):
                    raise DocumentError(f"{index}: weight_map: {file!r} is not the name of a safetensors file")
            return dict(where)
        if single.exists():
            with safe_open(_regular(single), framework="pt") as f:
                return dict.fromkeys(f.keys(), single.name)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError, RecursionError) as error:
        raise DocumentError(f"{folder}: weights are not readable ({type(error).__name__}: {error})") from None
    raise DocumentError(f"{folder}: holds neither {index.name} nor {single.name}")


def _regular(path: Path) -> Path:
    """``path``, unless it is a device or a pipe, which could not be mapped or would never end."""
    open_regular(path, 2**63 - 1, ", not a readable safetensors file").close()
    return path

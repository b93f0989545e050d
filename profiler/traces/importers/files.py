"""Files of foreign programs, read without trusting them.

No code of a file is run (`weights_only=True`, `allow_pickle=False`), what it unpacks to is limited to MAX_TRACE_BYTES
before it is unpacked, and every failure is a DocumentError of one line.
"""

import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ....spec import arrays
from ....spec.document import MAX_DOCUMENT_BYTES, show
from ....spec.errors import DocumentError
from ....spec.trace import MAX_TRACE_BYTES


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Turn whatever damaged or hostile bytes raise (zlib, numpy, torch, ...) into one line, and keep warnings quiet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DocumentError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DocumentError(f"{path}: not a readable {what} ({reason})") from None


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sorting key that puts layer_2 before layer_10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"([0-9]{1,18})", name)]


def recording(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file itself, or a folder's files with one of the suffixes, in natural order."""
    if path.is_dir():
        found = [file for file in path.iterdir() if file.suffix in suffixes and not file.name.startswith(".")]
        files = sorted(found, key=lambda file: natural(file.name))
        if not files:
            raise DocumentError(f"{path}: an empty recording: the folder holds no {' or '.join(suffixes)} file")
    else:
        files = [path]
    _limit(path, sum(file_size(file) for file in files))
    return files


def file_size(path: Path) -> int:
    """Bytes of a regular file, at most MAX_TRACE_BYTES."""
    try:
        size = path.stat().st_size if path.is_file() else None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise DocumentError(f"{str(path)!r}: cannot be read ({error})") from None
    if size is None:
        raise DocumentError(f"{path}: {'not a regular file' if path.exists() else 'no such file or folder'}")
    _limit(path, size)
    return size


def read_torch(path: Path, *, peek: bool = False) -> object:
    """What `torch.save` wrote, tensors on the CPU; ``peek`` leaves the tensors' bytes on the disk."""
    file_size(path)
    with readable(path, "torch.save file"):
        if not zipfile.is_zipfile(path):
            raise DocumentError(f"{path}: not a torch.save file (PyTorch 1.6 or later writes zip archives)")
        with zipfile.ZipFile(path) as archive:
            _limit(path, sum(item.file_size for item in archive.infolist()))
            pickled = sum(item.file_size for item in archive.infolist() if item.filename.endswith(".pkl"))
        if pickled > MAX_DOCUMENT_BYTES:
            raise DocumentError(f"{path}: {pickled >> 20} MiB beside its tensors, refused")
        try:
            return torch.load(path, weights_only=True, map_location="cpu", mmap=peek)
        except Exception as error:
            if "weights_only" in str(error) or "Unsupported" in str(error):
                raise DocumentError(
                    f"{path}: holds more than tensors, numbers, texts, lists and dictionaries: loading it could run "
                    "code, refused"
                ) from None
            raise


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Every array of an npz, in the archive's order."""
    return arrays.read_npz(path, MAX_TRACE_BYTES)


def read_npy(path: Path) -> np.ndarray:
    """One array; its shape must fit the file."""
    file_size(path)
    with readable(path, "npy"):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor, names in natural order."""
    from safetensors.torch import load_file

    file_size(path)
    with readable(path, "safetensors file"):
        tensors = load_file(path)
    return {name: tensors[name] for name in sorted(tensors, key=natural)}


def to_array(value: object, where: str, kinds: str) -> np.ndarray:
    """A plain tensor or array of numbers; ``kinds`` are numpy's letters: i and u integers, f floats.

    A tensor may be a view that repeats a small storage without end, so its size is checked before it is copied.
    """
    expected = "integers" if "f" not in kinds else "floats" if kinds == "f" else "numbers"
    if isinstance(value, Tensor):
        if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
            raise DocumentError(f"{where}: expected a plain dense tensor")
        if value.numel() * 8 > MAX_TRACE_BYTES:
            raise DocumentError(f"{where}: a tensor of {list(value.shape)}, refused (too large)")
        value = value.detach()
        if value.is_quantized or value.is_complex():
            raise DocumentError(f"{where}: expected {expected}, got {value.dtype}")
        if value.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):  # numpy lacks them
            value = value.float()
        with readable(Path(where), "tensor"):
            value = value.numpy()
    if not isinstance(value, np.ndarray):
        raise DocumentError(f"{where}: expected {expected} as a tensor, got {show(value)}")
    if value.dtype.kind not in kinds:
        raise DocumentError(f"{where}: expected {expected}, got {value.dtype}")
    return value


def _limit(path: Path, size: int) -> None:
    if size > MAX_TRACE_BYTES:
        raise DocumentError(f"{path}: {size >> 20} MiB (unpacked), refused (limit {MAX_TRACE_BYTES >> 20} MiB)")

"""Files of foreign programs, read without trusting them.

No code of a file is run (`weights_only=True`, `allow_pickle=False`), what it unpacks to is limited before it is
unpacked, and every failure is a DocumentError of one line.
"""

import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....spec import arrays
from ....spec.claims import check_unclaimed
from ....spec.document import show
from ....spec.errors import DocumentError
from ....spec.files import open_regular
from ....spec.trace import MAX_TRACE_BYTES

MAX_UNPACKED_BYTES = 512 * 2**20  # of a compressed archive; a plain file's bytes are on the disk, one for one
MAX_VALUES = 2**27  # of one array; a view can repeat a few bytes without end
MAX_DIRECTORY_BYTES = 2 * 2**20  # a zip's list of members, of at least 46 bytes each
MAX_PICKLED_BYTES = 2 * 2**20  # beside the tensors; PyTorch's safe unpickler takes some microseconds for each opcode


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
        reason = " ".join(f"{type(error).__name__}: {error}".removeprefix("error: ").split())[:200]
        raise DocumentError(f"{path}: not a readable {what} ({reason})") from None


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sorting key that puts layer_2 before layer_10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"([0-9]{1,18})", name)]


def recording(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The file itself, or a folder's files with one of the suffixes, in natural order."""
    if path.is_dir():
        with readable(path, "folder"):
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
        found = path.stat() if path.is_file() else None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise DocumentError(f"{str(path)!r}: cannot be read ({error})") from None
    if found is None:
        raise DocumentError(f"{path}: {'not a regular file' if path.exists() else 'no such file or folder'}")
    check_unclaimed(path, found)
    size = found.st_size
    _limit(path, size)
    if size == 0:
        with open_regular(path, MAX_TRACE_BYTES) as file:
            try:
                made = file.read(1) != b""  # None where it waits for what is to come, as some of /proc do
            except OSError as error:
                raise DocumentError(f"{str(path)!r}: cannot be read ({error.strerror})") from None
        if made:
            raise DocumentError(f"{path}: not a regular file: the system makes it up while it is read")
    return size


def read_torch(path: Path, *, peek: bool = False) -> object:
    """What `torch.save` wrote, tensors on the CPU; ``peek`` leaves the tensors' bytes on the disk."""
    file_size(path)
    with readable(path, "torch.save file"):
        if not zipfile.is_zipfile(path):
            raise DocumentError(f"{path}: not a torch.save file (PyTorch 1.6 or later writes zip archives)")
        members = _members(path)
        _limit(path, sum(item.file_size for item in members))
        if any(item.compress_type != zipfile.ZIP_STORED for item in members):
            raise DocumentError(f"{path}: a compressed archive, which torch.save does not write: refused")
        pickled = sum(item.file_size for item in members if item.filename.endswith(".pkl"))
        if pickled > MAX_PICKLED_BYTES:
            raise DocumentError(
                f"{path}: {pickled / 2**20:.1f} MiB of opcodes beside its tensors, refused (limit "
                f"{MAX_PICKLED_BYTES >> 20} MiB): record fewer tokens in a file, or save tensors instead of lists"
            )
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
    file_size(path)
    with readable(path, "npz"):
        _members(path)  # their list is measured
    return arrays.read_npz(path, min(MAX_UNPACKED_BYTES, MAX_TRACE_BYTES))


def _members(path: Path) -> list[zipfile.ZipInfo]:
    """The members of a zip, whose list is measured before it is read: each entry becomes a large Python object."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16 - 22))
        tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    size = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    if size > MAX_DIRECTORY_BYTES:
        raise DocumentError(f"{path}: a list of members of {size >> 20} MiB, refused")
    with zipfile.ZipFile(path) as archive:
        return archive.infolist()


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
    """A plain tensor or array of numbers, or nested lists; ``kinds`` are numpy's letters: i and u integers, f floats.

    A tensor may be a view that repeats a small storage without end, so its size is checked before it is copied.
    """
    expected = "integers" if "f" not in kinds else "floats" if kinds == "f" else "integers or floats"
    if isinstance(value, list):
        value = _from_lists(value, where, expected)
    if isinstance(value, Tensor):
        if type(value) is not Tensor or value.layout != torch.strided or value.device.type != "cpu":
            raise DocumentError(f"{where}: expected a plain dense tensor")
        if value.numel() > MAX_VALUES:
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


def _from_lists(value: list[Any], where: str, expected: str) -> np.ndarray:
    try:
        array = np.array(value)
    except (ValueError, OverflowError, RecursionError):
        raise DocumentError(f"{where}: a ragged list: expected {expected} in rows of equal length") from None
    if array.dtype.kind not in "iuf":
        raise DocumentError(f"{where}: expected {expected}, got other things than numbers of at most 64 bits")
    return array


def _limit(path: Path, size: int, most: int | None = None) -> None:
    most = MAX_TRACE_BYTES if most is None else min(most, MAX_TRACE_BYTES)
    if size > most:
        raise DocumentError(f"{path}: {size >> 20} MiB (unpacked), refused (limit {most >> 20} MiB)")

"""Arrays of an npz that someone else wrote: no object is built, and sizes are known before a byte is unpacked."""

import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from .errors import DocumentError
from .files import open_regular
from .texts import show

MAX_MEMBERS = 2**14
_PIECE = 2**24  # bytes that are unpacked at a time
_KIND = re.compile(rb'^\s*\{\s*"kind"\s*:\s*"(moeplan\.[a-z_]{1,40})"')


class Header(NamedTuple):
    """What an array will be."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


def read_npz(
    path: str | Path, limit: int, *, wanted: Mapping[str, int] | None = None, hint: str = ""
) -> dict[str, np.ndarray]:
    """Arrays by name, in the archive's order; only those in ``wanted`` if given, of at most so many bytes each.

    limit: bytes that the file, and all that is in it together, may have. hint: where a missing file comes from.
    Raises DocumentError, one line, for what is no regular file, no npz, damaged, too large, or holds Python objects.
    """
    with open_regular(path, limit, hint) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = _members(archive, limit, wanted, str(path))
                return {
                    name: _read_array(archive, member, f"{path}: {show(name)}", (wanted or {}).get(name, limit))
                    for name, member in members.items()
                }
        except DocumentError:
            raise
        except zipfile.BadZipFile as error:
            file.seek(0)
            if kind := _KIND.match(file.read(256)):
                name = kind[1].decode()
                raise DocumentError(f"{path}: a document of kind {name!r}, where an npz was expected{hint}") from None
            raise DocumentError(f"{path}: not a readable npz ({error}){hint}") from None
        except MemoryError:
            raise DocumentError(f"{path}: needs more memory than there is: record or import a part of it") from None
        except Exception as error:  # zipfile, zlib and numpy raise many kinds on damaged or hostile bytes
            reason = " ".join(f"{type(error).__name__}: {error}".removeprefix("error: ").split())[:200]
            raise DocumentError(f"{path}: not a readable npz ({reason})") from None


def _members(
    archive: zipfile.ZipFile, limit: int, wanted: Mapping[str, int] | None, where: str
) -> dict[str, zipfile.ZipInfo]:
    """The archive's members by the name of their array."""
    found: dict[str, zipfile.ZipInfo] = {}
    infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise DocumentError(f"{where}: {len(infos):,} arrays, at most {MAX_MEMBERS:,} are read")
    size = sum(info.file_size for info in infos)
    if size > limit:
        raise DocumentError(f"{where}: unpacks to {size >> 20:,} MiB, refused (limit {limit >> 20:,} MiB)")
    for info in infos:
        name = info.filename.removesuffix(".npy")
        if wanted is not None and name not in wanted:
            continue
        if name == info.filename:
            raise DocumentError(f"{where}: {show(name)}: expected an array, named {show(name + '.npy')}")
        if name in found:
            raise DocumentError(f"{where}: {show(name)} is there twice")
        found[name] = info
    return found


def _read_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str, most: int) -> np.ndarray:
    with archive.open(info) as file:
        shape, fortran, dtype = _read_header(file, where)
        count = math.prod(shape)  # in Python's integers, which do not overflow
        size, there = count * dtype.itemsize, info.file_size - file.tell()
        if size != there:
            raise ValueError(f"{info.filename}: {dtype} {show(list(shape))} needs {size:,} bytes, {there:,} are there")
        if size > most:
            raise DocumentError(f"{where}: {size:,} bytes, at most {most:,} are read: record or import a part of it")
        array = np.empty(count, dtype)
        content = memoryview(array.view(np.uint8).data) if size else memoryview(b"")
        for at in range(0, size, _PIECE):
            piece = file.read(min(_PIECE, size - at))
            content[at : at + _PIECE] = piece  # ValueError where it ends too early
    return array.reshape(shape, order="F" if fortran else "C")


def _read_header(file: IO[bytes], where: str) -> Header:
    """The header of an npy without objects. Raises DocumentError; ValueError where it is malformed."""
    try:
        version = np.lib.format.read_magic(file)
    except ValueError:
        raise DocumentError(f"{where}: no array: its header is missing") from None
    readers: dict[Any, Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise DocumentError(f"{where}: npy of version {version[0]}.{version[1]}, expected 1.0 or 2.0")
    header = Header(*readers[version](file))
    if header.dtype.hasobject or not header.dtype.itemsize or any(length < 0 for length in header.shape):
        raise ValueError(f"no plain array: {show(str(header.dtype))} {show(list(header.shape))}")
    return header

"""Where experts rest beyond a device's memory: a file of a rank's own, or, for a GPU, its host's memory, where the
host's processor can compute them, too.

The file has no name: nobody else can open it, and it ends with the rank, however that ends. Reads go past the system's
page cache, which would be memory beyond the limit.
"""

import errno
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..spec.errors import MoeplanError
from ..spec.offload import padded

__all__ = ["HOST", "ExpertFile", "HostMemory", "Tier", "places_for"]


HOST = torch.device("cpu")


class Tier(Protocol):
    """Holds experts by number; all of ``size`` bytes, whole pages."""

    def write(self, entry: int, place: Tensor) -> None:
        """place: [size] uint8, of ``places_for``."""
        ...

    def read(self, entry: int, place: Tensor) -> None:
        """The same back."""
        ...

    def rests(self, entry: int) -> Tensor:
        """[size] uint8 in memory of the host, where it rests; MoeplanError where it does not rest in memory."""
        ...


def places_for(count: int, size: int, device: torch.device) -> Tensor:
    """[count, padded size] uint8 memory of the device, which begins at a page, as direct reads need it."""
    if device.type != "cpu":
        return torch.empty((count, padded(size)), dtype=torch.uint8, device=device)
    memory = mmap(-1, max(count, 1) * padded(size))
    return torch.frombuffer(memory, dtype=torch.uint8).view(-1, padded(size))[:count]


class ExpertFile:
    """``entries`` stretches of ``size`` bytes (whole pages) in a file without a name in ``folder``.

    Raises MoeplanError where the folder cannot be written to, its disk is full, or its file system only reads through
    memory.
    """

    def __init__(self, folder: str | Path, entries: int, size: int) -> None:
        self.folder, self.size = Path(folder), size
        try:
            self._file = _nameless(self.folder)
        except OSError as error:
            why = "its file system reads through memory only" if error.errno == errno.EINVAL else error.strerror
            raise MoeplanError(f"{folder}: experts cannot rest there: {why}; give a folder on a disk") from None
        try:
            os.posix_fallocate(self._file, 0, max(entries * size, 1))
        except OSError as error:
            os.close(self._file)
            raise MoeplanError(
                f"{folder}: no space for {entries * size / 2**30:.2f} GiB of experts: {error.strerror}; free space "
                "there, profile with --offload on another disk, or raise --memory"
            ) from None

    def write(self, entry: int, place: Tensor) -> None:
        self._move(os.pwritev, entry * self.size, place)

    def read(self, entry: int, place: Tensor) -> None:
        self._move(os.preadv, entry * self.size, place)

    def rests(self, entry: int) -> Tensor:
        raise MoeplanError(
            f"{self.folder}: experts on a disk cannot be computed there: only a GPU's plan has host_rows"
        )

    def read_at(self, offset: int, place: Tensor) -> None:
        """Bytes from anywhere; offset and [bytes] are multiples of a page."""
        self._move(os.preadv, offset, place)

    def _move(self, call: Callable[[int, list[memoryview], int], int], offset: int, place: Tensor) -> None:
        held, done = place.numpy().data, 0
        while done < len(place):
            try:
                moved = call(self._file, [held[done:]], offset + done)
            except OSError as error:
                raise MoeplanError(f"{self.folder}: the file of experts: {error.strerror}") from None
            if not moved:
                raise MoeplanError(f"{self.folder}: the file of experts is shorter than what was written to it")
            done += moved

    def close(self) -> None:
        os.close(self._file)


def _nameless(folder: Path) -> int:
    """A file descriptor; of a file system without such files, one whose name is taken away at once."""
    with suppress(AttributeError, OSError):
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    made, name = tempfile.mkstemp(dir=folder)
    try:
        return os.open(name, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    finally:
        os.unlink(name)
        os.close(made)


class HostMemory:
    """Memory of the host that a GPU copies from by itself, on a stream beside the one that computes.

    Of a device that is a processor itself it is memory like any other, in which the same is tested without a GPU.
    """

    def __init__(self, entries: int, size: int, device: torch.device) -> None:
        gpu = device.type == "cuda"
        try:
            self._memory = torch.empty((entries, size), dtype=torch.uint8, pin_memory=gpu)
        except RuntimeError as error:
            raise MoeplanError(
                f"{entries * size / 2**30:.2f} GiB of the host's memory for experts: {error}; raise --memory, so that "
                "fewer rest there"
            ) from None
        self._stream = torch.cuda.Stream(device) if gpu else None

    def rests(self, entry: int) -> Tensor:
        return self._memory[entry]

    def write(self, entry: int, place: Tensor) -> None:
        self._memory[entry].copy_(place)

    def read(self, entry: int, place: Tensor) -> None:
        if self._stream is None:
            place.copy_(self._memory[entry])
            return
        with torch.cuda.stream(self._stream):
            place.copy_(self._memory[entry], non_blocking=True)
        self._stream.synchronize()

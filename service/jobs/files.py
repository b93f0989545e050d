"""Documents and results as files named by the SHA-256 of their bytes: in a folder, or wherever fsspec can write.

What is read is hashed again: a file that was changed or cut is refused, wherever it lies.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from ...caches import ExposedError, check_private
from ...spec.errors import MoeplanError
from .errors import TooLargeError, UnavailableError, UnknownError

PIECE = 2**20  # bytes that are read at a time
RESERVE = 64 * 2**20  # bytes of a disk that uploads leave free, for the database and for results


class Files(Protocol):
    """Files by digest."""

    def keep(self, path: Path, digest: str) -> None:
        """Take over a complete file, which is gone from ``path`` then; it is on the disk when this returns."""

    def fetch(self, digest: str, folder: Path) -> Path:
        """A path of the content, perhaps a copy in ``folder``. Raises UnknownError where it is gone or damaged."""

    def room(self) -> None:
        """Raise UnavailableError where the disk is full."""


class Folder:
    """In a folder of this machine, which nobody else can write to."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def keep(self, path: Path, digest: str) -> None:
        place = self._place(digest)
        place.parent.mkdir(mode=0o700, exist_ok=True)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(path, 0o600)
        os.replace(path, place)
        for folder in (place.parent, self.root):
            _sync(folder)

    def fetch(self, digest: str, folder: Path) -> Path:
        place = self._place(digest)
        check(place, digest)
        return place

    def room(self) -> None:
        if shutil.disk_usage(self.root).free < RESERVE:
            raise UnavailableError("the store's disk is full; nothing that was accepted is lost")

    def _place(self, digest: str) -> Path:
        return self.root / digest[:2] / digest


class Remote:
    """At an fsspec URL, such as s3://bucket/folder."""

    def __init__(self, url: str) -> None:
        """Raises MoeplanError where fsspec does not know the URL, or lacks a package for it."""
        try:
            import fsspec

            self.system, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError, OSError) as error:
            raise MoeplanError(f"--documents {url.split('?')[0]}: {error}") from None

    def keep(self, path: Path, digest: str) -> None:
        with _answering():
            place = self._place(digest)
            if not self.system.exists(place):
                self.system.makedirs(self.system._parent(place), exist_ok=True)
                self.system.put_file(str(path), place)
        path.unlink()

    def fetch(self, digest: str, folder: Path) -> Path:
        path = folder / digest
        with _answering():
            if not self.system.exists(self._place(digest)):
                raise UnknownError(f"document {digest[:16]}: it is in the store no more")
            self.system.get_file(self._place(digest), str(path))
        check(path, digest)
        return path

    def room(self) -> None:
        pass

    def _place(self, digest: str) -> str:
        return f"{self.root.rstrip('/')}/{digest[:2]}/{digest}"


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except MoeplanError:
        raise
    except Exception as error:  # each of fsspec's systems has its own errors
        raise UnavailableError(f"the store's documents cannot be reached ({error}); try again later") from error


def private(folder: Path) -> Path:
    """The folder, made where it is missing. Raises MoeplanError where others could write to it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(folder)
    except FileExistsError:
        raise MoeplanError(f"{folder}: cannot be used as a store (it is no folder): name a folder") from None
    except ExposedError as error:
        raise MoeplanError(f"{str(error).partition(': ')[0]}: the store must be yours alone (chmod go-w)") from None
    except OSError as error:
        raise MoeplanError(f"{folder}: cannot be used as a store ({error.strerror})") from None
    return Path(os.path.realpath(folder))


def check(path: Path, digest: str) -> None:
    """Raise UnknownError where the file is missing or its content is another."""
    h = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                h.update(piece)
    except FileNotFoundError:
        raise UnknownError(f"document {digest[:16]}: it is in the store no more") from None
    if h.hexdigest() != digest:
        raise UnknownError(f"document {digest[:16]}: its file in the store is damaged; send it again")


class Incoming:
    """A file that is being received: written piece by piece, hashed on the way, of a limited size."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.path, self.limit, self.size = folder / f"incoming-{secrets.token_hex(8)}", limit, 0
        self._hash = hashlib.sha256()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "Incoming":
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "wb")
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()
        self.path.unlink(missing_ok=True)

    def write(self, piece: bytes) -> None:
        """Raises TooLargeError, and OSError where the disk is full."""
        assert self._file is not None
        self.size += len(piece)
        if self.size > self.limit:
            raise TooLargeError(f"larger than {self.limit >> 20} MiB, refused")
        self._hash.update(piece)
        self._file.write(piece)

    def complete(self) -> str:
        """The digest; nothing more is written."""
        assert self._file is not None
        self._file.close()
        return self._hash.hexdigest()


def renamed(text: str, path: Path, name: str) -> str:
    """A message that calls a file by the name that its sender knows."""
    return text.replace(repr(str(path)), name).replace(str(path), name)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

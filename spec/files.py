"""Files that a user names, read without trusting them: regular ones only, of a bounded size.

A device, a FIFO or a socket may have no end or never answer; a link to a regular file is as good as the file.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from .claims import check_unclaimed
from .errors import DocumentError

MAX_DOCUMENT_BYTES = 64 * 2**20
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


def kind_of(mode: int) -> str:
    """What a file is that is no regular one, as text, by its ``st_mode``."""
    return _KINDS.get(stat.S_IFMT(mode), "a special file")


def open_regular(path: str | Path, limit: int, hint: str = "") -> BinaryIO:
    """A regular file of at most ``limit`` bytes, opened; ``hint`` says where a missing one comes from.

    Raises DocumentError, one line, for whatever else the path names.
    """
    try:
        # Not blocking: the open of a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError:
        raise DocumentError(f"{path}: no such file{hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise _unreadable(path, error) from None
    found = os.fstat(descriptor)
    try:
        check_unclaimed(path, found)
    except DocumentError:
        os.close(descriptor)
        raise
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise DocumentError(f"{path}: {kind_of(found.st_mode)}, not a regular file")
    if found.st_size > limit:
        os.close(descriptor)
        raise _too_large(path, limit)
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, limit: int = MAX_DOCUMENT_BYTES, hint: str = "") -> bytes:
    """The content of a regular file of at most ``limit`` bytes. Raises DocumentError."""
    with open_regular(path, limit, hint) as file:
        try:
            data: bytes | None = file.read(limit + 1)  # a file of /proc tells no size, and any may have grown
        except OSError as error:
            raise _unreadable(path, error) from None
    if data is None:  # one of /proc that waits for what is to come
        raise DocumentError(f"{path}: not a regular file: it waits for what is to come")
    if len(data) > limit:
        raise _too_large(path, limit)
    return data


def read_text(path: str | Path, hint: str = "", limit: int = MAX_DOCUMENT_BYTES) -> str:
    """A regular file of UTF-8 text of at most ``limit`` bytes; ``hint`` says where a right one comes from."""
    try:
        return read_bytes(path, limit, hint).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _unreadable(path, error, hint) from None


def _unreadable(path: str | Path, error: OSError | ValueError, hint: str = "") -> DocumentError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    what = "as UTF-8 text " if isinstance(error, UnicodeDecodeError) else ""
    return DocumentError(f"{str(path)!r}: cannot be read {what}({reason}){hint}")


def _too_large(path: str | Path, limit: int) -> DocumentError:
    size = f"{limit >> 20} MiB" if limit >= 2**20 else f"{limit} bytes"
    return DocumentError(f"{path}: larger than {size}, refused")

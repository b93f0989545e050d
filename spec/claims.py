"""Files that a command will write are not read by it: its result would take the place of what it was made from.

An output is claimed before the work. Whatever opens a file to read it asks here, so that links, other spellings of a
path, files of a folder and files that a document names are all seen, in every command.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import DocumentError

_claims: dict[tuple[int, int], str] = {}
"""Name of each claimed file by device and inode."""


def claim(path: str | Path) -> None:
    """From now on reading the file that is at ``path``, if there is one, is refused."""
    with contextlib.suppress(OSError, ValueError):  # nothing there, or a path that no output can have
        _claims[_identity(os.stat(path))] = str(path)


def written(before: os.stat_result) -> None:
    """An output has taken the place of the file that was there ``before``, whose number another file may get now."""
    _claims.pop(_identity(before), None)


def release() -> None:
    """Forget all claims: another command begins."""
    _claims.clear()


def check_unclaimed(path: str | Path, found: os.stat_result) -> None:
    """Raise DocumentError where a file that is to be read is an output too. ``found``: what ``os.stat`` says of it."""
    claimed = _claims.get(_identity(found))
    if claimed is not None:
        where = "the output would replace it" if claimed == str(path) else f"the output {claimed} is the same file"
        raise DocumentError(f"{path}: is read, and {where}: name another output")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[None]:
    """What is read inside may be an output: the user means that the new document replaces the old one."""
    claimed = None
    with contextlib.suppress(OSError, ValueError):
        claimed = _identity(os.stat(path))
    name = _claims.pop(claimed, None) if claimed else None
    try:
        yield
    finally:
        if claimed and name is not None:
            _claims[claimed] = name


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino

"""Files that a command writes: looked at before the work, written whole or not at all.

What a path stands for decides what is written, and how:

- a regular file, or none yet: through a temporary file beside it that takes its place in one step;
- a link: the same, for the file that it names; the link stays;
- ``/dev/stdout``, ``/dev/fd/N``: into what is open there, also where that is a pipe;
- ``/dev/null``, ``/dev/full``, ``/dev/zero``, a terminal: into the device;
- anything else (another device, a FIFO, a socket, a folder, a mount point): refused.

Folders that are missing on the way are made, and whoever asked to be told (``tell_of_folders``) is told.
"""

import contextlib
import errno
import fcntl
import io
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from .claims import written
from .errors import DocumentError
from .files import kind_of

FREE_BYTES = 2**20
"""Bytes that must be free where an output goes; its real size is not known before the work."""

_teller: Callable[[Path], object] | None = None

_OPEN_FILE = re.compile(r"/(?:dev/fd|proc/(?:self|thread-self|[0-9]+)/(?:task/[0-9]+/)?fd)/([0-9]{1,9})")
_MEMORY, _NULL_ZERO_FULL = 1, (3, 5, 7)  # Linux's major and minor numbers
_TERMINALS = {4, 5, *range(136, 144)}


def tell_of_folders(teller: Callable[[Path], object] | None) -> None:
    """From now on ``teller`` is called with every folder that is made for an output; None: nobody is told."""
    global _teller
    _teller = teller


def check_output(path: str | Path) -> None:
    """Raise DocumentError, one line, where ``write_atomically`` could not write to this path. Nothing is left there.

    Tries what the write will do: whether the folder takes a new file, and ``FREE_BYTES`` in it.
    """
    try:
        target = _target(path)
        if isinstance(target, int):
            os.close(target)
            return
        folder = target.parent
        while not folder.exists():  # it will be made
            folder = folder.parent
        temporary, descriptor = _new_file(folder)
        try:
            os.posix_fallocate(descriptor, 0, FREE_BYTES)
        finally:
            os.close(descriptor)
            os.unlink(temporary)
    except OSError as error:
        raise _refusal(path, error) from None


def write_atomically(path: str | Path, fill: Callable[[IO[bytes]], object]) -> Path:
    """Let ``fill`` write to ``path``: a reader never sees half a file, and a failure leaves what was there before.

    Missing folders are made, and told of. Permissions are those of the file that is replaced, else by the umask.
    Raises DocumentError for a path that cannot be written.
    """
    path = Path(path)
    try:
        target = _target(path)
        if isinstance(target, int):
            _write_into(target, fill)
            return path
        _make(target.parent)
        temporary, descriptor = _new_file(target.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                fill(file)
                before = target.stat() if target.exists() else None
                if before is not None:
                    os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode) & 0o777)
            os.replace(temporary, target)
            if before is not None:
                written(before)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _refusal(path, error) from None
    return path


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Between reading a document and writing it again: one process at a time, of those that ask too.

    The folder is locked, which leaves no file behind. Raises DocumentError where there can be no folder.
    """
    folder = Path(os.path.realpath(path)).parent
    try:
        _make(folder)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _refusal(path, error) from None
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks: only a tie is lost there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make(folder: Path) -> None:
    """The folder and those above it, where they are missing."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if _teller is not None:
        _teller(folder)


def _target(path: str | Path) -> Path | int:
    """The regular file, existing or new, that a path stands for; or the descriptor of what is written into.

    Raises OSError.
    """
    if not str(path) or "\0" in str(path):
        raise OSError(errno.EINVAL, "an empty path, or a null character in it")
    here = os.path.abspath(path)
    for _ in range(40):  # as many links as Linux follows
        if match := _OPEN_FILE.fullmatch(here):
            return _duplicate(int(match[1]))
        if not os.path.islink(here):
            break
        here = os.path.normpath(os.path.join(os.path.realpath(os.path.dirname(here)), os.readlink(here)))
    target = Path(os.path.realpath(os.path.dirname(here)), os.path.basename(here))
    try:
        found = target.lstat()
    except FileNotFoundError:
        return target
    if stat.S_ISCHR(found.st_mode) and _is_harmless(found.st_rdev):
        return os.open(target, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, f"it is {kind_of(found.st_mode)}; give the name of a file, or /dev/stdout")
    _check_replaceable(target, found)
    return target


def _is_harmless(device: int) -> bool:
    major, minor = os.major(device), os.minor(device)
    return major in _TERMINALS or (major == _MEMORY and minor in _NULL_ZERO_FULL)


def _duplicate(number: int) -> int:
    """A descriptor of its own for an open file that can be written to."""
    descriptor = os.dup(number)
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        os.close(descriptor)
        raise OSError(errno.EBADF, "it is open for reading only")
    return descriptor


def _check_replaceable(target: Path, found: os.stat_result) -> None:
    """Raise OSError where a file may not be replaced though its folder takes others."""
    folder = target.parent.stat()
    me = os.geteuid()
    if folder.st_mode & stat.S_ISVTX and me not in (0, found.st_uid, folder.st_uid):
        raise OSError(errno.EPERM, "it belongs to someone else")
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    if os.fspath(target) in {re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split()[4]) for line in mounts}:
        raise OSError(errno.EBUSY, "it is a mount point; give a file in a mounted folder")


def _new_file(folder: Path) -> tuple[Path, int]:
    """An empty file with a name of its own, opened for writing; its mode by the umask."""
    path = folder / f".moeplan-{secrets.token_hex(8)}"
    return path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _write_into(descriptor: int, fill: Callable[[IO[bytes]], object]) -> None:
    """Write to a device or an open file once the whole content is there (an npz is not written front to back)."""
    content = io.BytesIO()
    with os.fdopen(descriptor, "wb") as file:
        fill(content)
        file.write(content.getbuffer())


def _refusal(path: str | Path, error: OSError) -> DocumentError:
    shown = str(path) if str(path).isprintable() else repr(str(path))
    return DocumentError(f"{shown}: cannot be written ({error.strerror or error})")

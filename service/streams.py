"""Standard input, output and error as a command needs them, whatever it was started with."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class FailedOutput(Exception):
    """Standard output is full or closed."""


class ClosedPipe(BaseException):
    """Whoever read our standard output has gone. No OSError: other libraries end the program at that as they like."""


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """While the block lasts, characters that the output cannot show become ``?``, and failing writes have one meaning.

    On standard output, ClosedPipe where its reader has gone, FailedOutput where it is closed or full; on standard
    error, nothing: what cannot be told must not end the work.
    """
    _open_missing()
    out, err = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Output(_tolerant(out)), _Silent(_tolerant(err))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, err


def _open_missing() -> None:
    """Open what was closed, or the next file would take its number and be written into by every print.

    In the direction that fails, so that closed output is an error of whoever writes to it.
    """
    for number, flags, name, mode in ((0, os.O_RDONLY, "stdin", "r"), (1, os.O_RDONLY, "stdout", "w"),
                                      (2, os.O_WRONLY, "stderr", "w")):  # fmt: skip
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, flags)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, errors="replace", closefd=False))  # noqa: SIM115


def _tolerant(stream: TextIO) -> TextIO:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        stream.reconfigure(errors="replace")  # type: ignore[attr-defined]
    return stream


class _Stream:
    """A text stream; what is not said here is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Any, *arguments: Any) -> None:
        try:
            action(*arguments)
        except OSError as error:
            self._drop()
            self._failed(error)

    def _drop(self) -> None:
        """What is still in the buffer goes nowhere, or the interpreter would try it again at its end."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def _failed(self, error: OSError) -> None:
        raise NotImplementedError


class _Output(_Stream):
    def _failed(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            raise ClosedPipe from None
        raise FailedOutput(f"standard output: cannot be written ({error.strerror})") from None


class _Silent(_Stream):
    def _failed(self, error: OSError) -> None:
        pass

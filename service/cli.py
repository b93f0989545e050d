"""The entry point: starts the command line so that whatever ends it is one line and an exit code.

It imports nothing heavy itself: Ctrl-C counts from the first moment, and the terminal is set right before others read
it.
"""

import atexit
import os
import re
import signal
import sys
from collections.abc import Callable

from .streams import ClosedPipe, FailedOutput, standard_streams

INTERRUPTED, CLOSED_PIPE, BAD_INPUT = 130, 141, 2

MAX_MESSAGE = 1500


def main() -> None:
    """Entry point: errors that a user can mend are one line without a traceback."""
    _mend_terminal()
    with standard_streams():
        code = _guarded()
    # What is done stays done: an interpreter that ends gives the signal back, and Ctrl-C would then end it as failed.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _guarded() -> int:
    """The command's exit code; Ctrl-C is 130, however deep in an import or a destructor it strikes."""
    code = 0
    try:
        with _Interrupts() as interrupts:
            code = interrupts.told(_run)
        sys.stdout.flush()
    except ClosedPipe:
        return CLOSED_PIPE  # quiet, as of other tools: the reader has what it wanted
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except Exception as error:
        if not (text := _mendable(error)):
            raise
        _say(text)
        return getattr(error, "exit_code", BAD_INPUT)
    return code


def _run() -> int:
    from .app import app

    try:
        app()  # usage errors and exit codes are typer's to handle
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else BAD_INPUT
    return 0


class _Interrupts:
    """Ctrl-C raises KeyboardInterrupt, and is not forgotten where a library swallows it or turns it into another error.

    A command that ends a search itself at Ctrl-C has a handler of its own for that time. Where the signal is ignored
    (``nohup``, ``&`` in a script) it stays so.
    """

    def __init__(self) -> None:
        self.struck = False

    def __enter__(self) -> "_Interrupts":
        self.before = signal.getsignal(signal.SIGINT)
        if self.before is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._strike)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.before)

    def _strike(self, number: int, frame: object) -> None:
        self.struck = True
        raise KeyboardInterrupt

    def told(self, run: Callable[[], int]) -> int:
        try:
            code = run()
        except BaseException:
            if self.struck:
                raise KeyboardInterrupt from None
            raise
        if self.struck:
            raise KeyboardInterrupt
        return code


def _mendable(error: Exception) -> str | None:
    """What to say of an error that a user can mend; None for a fault of this program."""
    from ..spec.errors import MoeplanError

    if isinstance(error, MoeplanError | FailedOutput):
        return _one_line(str(error))
    if isinstance(error, MemoryError):
        return "not enough memory: give it less to do, or a machine with more"
    if isinstance(error, OSError):  # of this machine: no folder, no space, no rights
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return None


def _one_line(text: str) -> str:
    """Names of files and fields, and what libraries say of them, are part of messages, and may hold anything."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]}..."


def _say(text: str) -> None:
    try:
        from rich.text import Text

        from .console import err

        err.print(Text.assemble(("error:", "bold red"), " ", text), soft_wrap=True)
    except KeyboardInterrupt:
        pass


def _mend_terminal() -> None:
    """Sizes of a terminal in the environment that are none are left out: at a width of 0 nothing would be printed."""
    for name, least in (("COLUMNS", 20), ("LINES", 1), ("TERMINAL_WIDTH", 20)):
        text = os.environ.get(name)
        if text is not None and not (re.fullmatch("[0-9]{1,4}", text) and int(text) >= least):
            del os.environ[name]

"""What every command shares: consoles, progress, JSON output, sizes, the launcher that its options name."""

import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event as Flag
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ..spec.errors import MoeplanError

out = Console()
err = Console(stderr=True)

Event = dict[str, Any]
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def print_json(value: Any) -> None:
    """One JSON document on standard output, nothing else."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextmanager
def progress(title: str) -> Iterator[Callable[[Event], None]]:
    """A progress bar on standard error, fed with events ``{"done": i, "of": n, "what": text}``."""
    what = TextColumn("[dim]{task.fields[what]}")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), what)
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(title, total=None, what="")

        def show(event: Event) -> None:
            bar.update(task, completed=event.get("done"), total=event.get("of"), what=str(event.get("what", "")))

        yield show


@contextmanager
def stop_on_interrupt() -> Iterator[Flag]:
    """A flag that the first Ctrl-C sets, so that a search ends with the best found; a second one interrupts."""
    flag = Flag()

    def ask(number: int, frame: object) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        err.print("stopping with the best found so far; Ctrl-C again to give up")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)


def parse_bytes(text: str) -> int:
    """``8GiB``, ``512M``, ``1.5g`` or plain bytes; powers of 1,024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not match or float(match[1]) == 0:
        raise MoeplanError(f"size {text!r}: expected a positive number with K, M, G or T, such as 8GiB")
    return int(float(match[1]) * _UNITS[match[2]])

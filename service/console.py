"""What every command shares: consoles, progress, JSON output."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event as Flag
from threading import Thread
from time import monotonic
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.text import Text

Event = dict[str, Any]
SECONDS_A_LINE = 10.0


class _Printable:
    """What a renderable prints, without characters that steer a terminal, which a name in a file may hold."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.inner, options):
            text = segment.text
            if not segment.control and not text.isprintable():
                text = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
            yield Segment(text, segment.style, segment.control)


class _Names(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Printable(renderable) for renderable in renderables]


def literal_console(**options: Any) -> Console:
    """A console that prints every text as it is, whatever brackets, colons or numbers it holds; style comes by Text.

    Names of models, devices, hosts and files are part of nearly every text. What a terminal would obey becomes ``?``.
    """
    console = Console(markup=False, emoji=False, highlight=False, **options)
    console.push_render_hook(_Names())
    return console


out = literal_console()
err = literal_console(stderr=True)


def say(text: str) -> None:
    """One line on standard output, as wide as it is: paths and commands are copied from it."""
    out.print(text, soft_wrap=True)


def note(text: str) -> None:
    """Something to know beside the result, on standard error."""
    err.print(Text.assemble(("note:", "yellow"), " ", text), soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output, nothing else."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextmanager
def progress(title: str) -> Iterator[Callable[[Event], None]]:
    """A progress bar on standard error, fed with events ``{"done": i, "of": n, "what": text}``.

    Where that is no terminal but a log, a line every ten seconds.
    """
    if not err.is_terminal:
        with _Lines(title) as lines:
            yield lines
        return
    what = TextColumn("{task.fields[what]}", style="dim", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), what)
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(title, total=None, what="")

        def show(event: Event) -> None:
            bar.update(task, completed=event.get("done"), total=event.get("of"), what=str(event.get("what", "")))

        yield show


class _Lines:
    """Writes how far it is every ``SECONDS_A_LINE``, also where nothing was heard meanwhile."""

    def __init__(self, title: str) -> None:
        self.title, self.start, self.ended = title, monotonic(), Flag()
        self.last: Event = {"what": "starting"}
        self.writer = Thread(target=self._write, daemon=True)

    def __enter__(self) -> "_Lines":
        self.writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.writer.join()

    def __call__(self, event: Event) -> None:
        self.last = event

    def _write(self) -> None:
        while not self.ended.wait(SECONDS_A_LINE):
            event = self.last
            share = [f"{event['done'] / event['of']:.0%}"] if event.get("of") else []
            parts = [*share, *filter(None, [str(event.get("what", ""))])]
            with suppress(OSError, ValueError):  # closed meanwhile: whoever writes the result finds out
                err.print(f"{self.title}, {monotonic() - self.start:.0f} s: {', '.join(parts)}")


@contextmanager
def stop_on_interrupt() -> Iterator[Flag]:
    """A flag that the first Ctrl-C sets, so that a search ends with the best found; a second one interrupts."""
    flag = Flag()

    def ask(number: int, frame: object) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        with suppress(RuntimeError):  # it struck while this very stream was being written to
            err.print("stopping with the best found so far; Ctrl-C again to give up")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, before)

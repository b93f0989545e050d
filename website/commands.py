"""Commands in the documents: which a machine can run, which it is told not to, and whether their options exist.

A block of commands is a fence that says ``sh``, or an indented block with a line that begins with ``moeplan``,
``make`` or ``python``. HTML comments directly before a block tell what to do with it:

    <!-- not run: reason -->        needs root, other hardware, long, or files from elsewhere
    <!-- run first: command -->     also several, one a line: what the reader has done already
    <!-- file: NAME -->             before a block of any kind: its text is a file that later commands read
"""

import re
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup

from ..service.app import app
from .markdown import Block, blocks
from .pages import ROOT

OURS = re.compile(r"^(moeplan|make|python3?|torchrun) ", re.M)


class Commands(NamedTuple):
    """Commands of one block.

    where: document and line; lines: each whole, also where a backslash continues it; not_run: why not, or nothing;
    first: commands before them.
    """

    where: str
    lines: tuple[str, ...]
    not_run: str
    first: tuple[str, ...] = ()


class File(NamedTuple):
    """A file that a document shows."""

    name: str
    text: str


def steps(document: str) -> Iterator[Commands | File]:
    """What a document tells to do and shows, in order; document: its path in the repository."""
    yield from steps_of((ROOT / document).read_text(), document)


def steps_of(text: str, document: str) -> Iterator[Commands | File]:
    """The same of a text."""
    for block in blocks(text):
        said = dict(_said(block))
        if name := said.get("file"):
            yield File(name, block.text)
        elif block.info == "sh" or (block.info == "indented" and OURS.search(block.text)):
            first = tuple(_lines(said.get("run first", "")))
            yield Commands(f"{document}:{block.line}", tuple(_lines(block.text)), said.get("not run", ""), first)


def _said(block: Block) -> Iterator[tuple[str, str]]:
    for comment in block.comments:
        name, colon, value = comment.partition(":")
        if colon and name in ("not run", "run first", "file"):
            yield name, value.strip()


def _lines(text: str) -> Iterator[str]:
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            yield line.strip()


def problems(command: str) -> list[str]:
    """What is wrong with a line as it is written: a command, option, target or file of ours that does not exist."""
    parts = shlex.split(command, comments=True)
    if not parts:
        return []
    if parts[0] == "make":
        targets = [part for part in parts[1:] if "=" not in part and not part.startswith("-")]
        known = set(" ".join(re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.M)).split())
        return [f"make {target}: no such target" for target in targets if target not in known]
    if parts[0].startswith("python") and len(parts) > 1 and parts[1].endswith(".py"):
        return [] if (ROOT / parts[1]).is_file() else [f"{parts[1]}: no such file"]
    if "moeplan" in parts[:1] or ("-m" in parts and parts[parts.index("-m") + 1 :][:1] == ["moeplan"]):
        return _options(parts[parts.index("moeplan") + 1 :])
    if "-m" in parts and (module := parts[parts.index("-m") + 1]).startswith("moeplan."):
        path = ROOT.joinpath(*module.split(".")[1:])
        return [] if path.with_suffix(".py").is_file() or path.is_dir() else [f"{module}: no such module"]
    return []


VALUED = ("--server", "--token-file")
"""Options before the command that have a value."""


def _options(parts: list[str]) -> list[str]:
    command: Any = typer.main.get_command(app)
    known, name = _names(command), "moeplan"
    found = []
    is_value = False  # of the option before it; behind a command nobody asks
    for part in parts:
        if part.startswith("-"):
            if part.partition("=")[0] not in known:
                found.append(f"{name} has no option {part}")
            is_value = isinstance(command, TyperGroup) and part in VALUED
        elif is_value:
            is_value = False
        elif isinstance(command, TyperGroup):
            context = typer.Context(command)
            if part not in command.list_commands(context):
                return [*found, f"{name} has no command {part}"]
            command, name = command.get_command(context, part), f"{name} {part}"
            known |= _names(command)
    return found


def _names(command: Any) -> set[str]:
    return {"--help", "-h"} | {name for option in command.params for name in (*option.opts, *option.secondary_opts)}

"""Options that several commands have."""

from pathlib import Path
from typing import Any

import typer

from ..spec.picture import picture_kind


def picture_option(words: str) -> Any:
    """A picture to write; other kinds of files are refused before any work. ``words``: what it shows."""
    return typer.Option(help=f"{words} (.png, .svg or .pdf).", callback=_known)


def _known(path: Path | None) -> Path | None:
    if path is not None:
        picture_kind(path)
    return path

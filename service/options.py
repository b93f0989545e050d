"""Options that several commands have."""

import os
from pathlib import Path
from typing import Any

import typer

from ..spec.claims import claim
from ..spec.errors import DocumentError
from ..spec.output import check_output
from ..spec.picture import picture_kind

CLUSTER, WORKLOAD = Path("cluster.json"), "decode:16@512"
"""Of `solve`, by default."""
MAX_SECONDS = 1e7
"""Of a time limit: four months."""
MAX_SEED = 2**63 - 1


def output_option(text: str, *names: str) -> Any:
    """The document to write, ``--output`` or of other names; a path that cannot be written is refused before any
    work."""
    return typer.Option(*(names or ("--output", "-o")), help=text, callback=checked_output)


def picture_option(text: str) -> Any:
    """A picture to write; other kinds of files are refused before any work too. ``text``: what it shows."""
    return typer.Option(help=f"{text} (.png, .svg or .pdf).", callback=_checked_picture)


def checked_output(context: typer.Context, path: Path | None) -> Path | None:
    """The path, if it can be written to and no other output of this command goes there. Raises DocumentError.

    From then on this command does not read that file. Of several ranks that torchrun or Slurm started only the first
    writes.
    """
    if path is None or context.resilient_parsing:
        return path
    claim(path)
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return path
    check_output(path)
    others = context.meta.setdefault("moeplan.outputs", set())
    place = os.path.realpath(path)
    if place in others and os.path.basename(place) != "null":
        raise DocumentError(f"{path}: two outputs of this command would go there: name two files")
    others.add(place)
    return path


def _checked_picture(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        picture_kind(path)
    return checked_output(context, path)

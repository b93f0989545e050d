"""Reference pages, generated: the command line, the Python functions and documents, and the catalogue of models."""

from typing import Any

import typer
from typer.cli import get_docs_for_click

import moeplan

from ..runtime import embedding
from ..service.app import app
from ..spec.catalogue import catalogue_rows


def cli_page() -> str:
    """Every command with its arguments and options."""
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="moeplan")
    return get_docs_for_click(obj=group, ctx=context, name="moeplan", title="Command line")


def python_page() -> str:
    """What ``from moeplan import ...`` offers, functions first; the site's Python handler fills it in."""
    functions = [name for name in moeplan.__all__ if name.islower() and not name.startswith("_")]
    others = [name for name in moeplan.__all__ if not name.islower()]
    parts = ["# Python", "Everything here is imported as `from moeplan import NAME`."]
    parts += map(_filled_in, (getattr(moeplan, name) for name in (*functions, *others)))
    parts += ["# moeplan.transformers", "[Your own model under a plan](../transformers.md)."]
    parts += (_filled_in(getattr(embedding, name)) for name in embedding.__all__)
    return "\n\n".join(parts) + "\n"


def _filled_in(item: Any) -> str:
    return f"::: {item.__module__}.{item.__qualname__}"


def models_page() -> str:
    """The catalogue as a table."""
    head = ["model", "layers with experts", "layers", "experts", "top-k", "hidden", "FFN of an expert"]
    head += ["parameters, billions", "active, billions", "an expert, MiB", "stored as", "executed"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in catalogue_rows():
        sizes = [row["moe_layers"], row["layers"], row["experts"], row["top_k"], row["hidden"], row["expert_ffn"]]
        numbers = [row["total_parameters"] / 1e9, row["active_parameters"] / 1e9]
        cells = [f"`{row['name']}`", *map(str, sizes), *(f"{number:.2f}" for number in numbers)]
        cells += [f"{row['expert_bytes'] / 2**20:.1f}", row["expert_format"], row["not_executed"] or "yes"]
        lines.append(f"| {' | '.join(cells)} |")
    told = (
        "The catalogue, as `moeplan models` prints it. Any Hugging Face `config.json` works too: "
        "`moeplan models path/to/config.json` shows what is read from it. What the runtime does not execute can "
        "still be placed, explained, compared and exported."
    )
    return "\n\n".join(["# Models", told, "\n".join(lines)]) + "\n"

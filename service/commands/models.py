"""``moeplan models``: the catalogue, what was read from configurations, or a document to fill in."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from ...spec.catalogue import CatalogueRow, catalogue_rows
from ...spec.catalogue.template import write_template
from ...spec.errors import MoeplanError
from ..console import out, print_json, say


def models(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Only these: catalogue names, or paths of a Hugging Face config.json."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    template: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a Model document to fill in, for a model that cannot be read, and say what its fields mean.",
        ),
    ] = None,
) -> None:
    """List the catalogue: layers, experts, total and active parameters, bytes per expert as stored.

    Any Hugging Face `config.json` works too: `moeplan models path/to/config.json` shows what is read from it. A model
    whose code comes with it is described in a file: `moeplan models --template model.json` writes one, and
    `moeplan place --model model.json` takes it.

    Example: `moeplan models`
    """
    if template is not None:
        if names or as_json:
            raise MoeplanError("--template: expected without models and without --json")
        _write(template)
        return
    rows = catalogue_rows(names or ())
    if as_json:
        print_json(rows)
        return
    out.print(models_table(rows))
    out.print("layers: with experts, of all; total, active: billions of parameters")
    out.print("MiB: of one expert as stored, scales included, in the type beside it")
    if any(row["not_executed"] for row in rows):
        out.print(
            "*: not executed by moeplan's own layers, but by Transformers' where it can; `moeplan models NAME` says why"
        )
    for row in rows if names else ():
        if row["not_executed"]:
            say(f"{row['name']}: {row['not_executed']}")


def _write(path: Path) -> None:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
    for name in ("field", "value", "meaning"):
        table.add_column(f"{name} ", overflow="fold")
    for field, value, meaning in write_template(path):
        table.add_row(f"{field} ", f"{value} ", meaning)
    out.print(table)
    say(f"wrote {path}; `moeplan models {path}` shows what it says, and place, explain, compare and export take it")


def models_table(rows: list[CatalogueRow]) -> Table:
    """Names are what one types: all of it fits 80 columns, so that none is cut."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name in ("model", "layers", "experts", "top-k", "hidden", "FFN", "total", "active", "MiB", ""):
        table.add_column(name, justify="left" if name in ("model", "") else "right", no_wrap=name == "model")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['moe_layers']}/{row['layers']}",
            str(row["experts"]),
            str(row["top_k"]),
            str(row["hidden"]),
            str(row["expert_ffn"]),
            f"{row['total_parameters'] / 1e9:.2f}",
            f"{row['active_parameters'] / 1e9:.2f}",
            f"{row['expert_bytes'] / 2**20:.1f}",
            f" {row['expert_format']}{'*' if row['not_executed'] else ''}",
        )
    return table

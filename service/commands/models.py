"""``moeplan models``: the catalogue."""

from typing import Annotated

import typer
from rich import box
from rich.table import Table

from ...spec.catalogue import catalogue_rows
from ..console import out, print_json


def models(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the catalogue: layers, experts, total and active parameters, bytes per expert.

    Any Hugging Face `config.json` works too: `moeplan solve --model path/to/config.json`.

    Example: `moeplan models`
    """
    rows = catalogue_rows()
    if as_json:
        print_json(rows)
        return
    # Names are what one types: all of it fits 80 columns, so that none is cut.
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for name in ("model", "layers", "experts", "top-k", "hidden", "FFN", "total B", "active B", "MiB/expert"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=name == "model")
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
        )
    out.print(table)
    out.print("layers: with experts, of all; B: billions of parameters; MiB in the model's type")

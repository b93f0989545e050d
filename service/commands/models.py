"""``moeplan models``: the catalogue."""

from typing import Annotated

import typer
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
    table = Table(title="Models", title_justify="left")
    for name in ("model", "layers", "experts", "top-k", "hidden", "FFN", "parameters", "active", "bytes/expert"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['moe_layers']} of {row['layers']}",
            str(row["experts"]),
            str(row["top_k"]),
            str(row["hidden"]),
            str(row["expert_ffn"]),
            f"{row['total_parameters'] / 1e9:.2f} B",
            f"{row['active_parameters'] / 1e9:.2f} B",
            f"{row['expert_bytes'] / 2**20:.1f} MiB",
        )
    out.print(table)

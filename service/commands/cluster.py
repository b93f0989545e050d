"""``moeplan cluster``: a cluster of GPUs that measured tables know, by name."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ...planner.described import cluster_of, joined
from ...spec.cluster import Cluster
from ...spec.described import TEMPLATE, Described, parse_device, read_described
from ...spec.document import read_text
from ...spec.errors import MoeplanError
from ...spec.output import write_atomically
from ...spec.quantities import parse_rate
from ..console import out, print_json, say
from ..options import output_option
from ..pages.cluster_made import made_table
from ..tabled import tables_of


def cluster(
    description: Annotated[
        Path | None, typer.Argument(help="A YAML file of hosts, network cards and switches; see --template.")
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option("--device", metavar="KIND:HOSTSxGPUS", help="Such as h100_sxm:2x8; repeat it.")
    ] = None,
    between: Annotated[
        str | None,
        typer.Option(help="What one GPU sends to another host, such as 50GB/s or 400Gb/s; else by the data sheet."),
    ] = None,
    add: Annotated[
        Path | None, typer.Option(help="Add the devices of a cluster that `moeplan profile` measured.")
    ] = None,
    tables: Annotated[
        Path | None, typer.Option(help="A folder of measured tables, instead of those of the extra `silicon`.")
    ] = None,
    template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a description to fill in, and nothing else.")
    ] = None,
    output: Annotated[Path, output_option("The cluster document.")] = Path("cluster.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the cluster instead of a table.")] = False,
) -> None:
    """Describe GPUs that you need not own: what each does is in measured tables under its name.

    Example: `moeplan cluster --device h100_sxm:2x8 --device l40s:1x8 --between 50GB/s`

    From a file: `moeplan cluster --template hosts.yaml`, then `moeplan cluster hosts.yaml`
    """
    if template is not None:
        if description is not None or device or add:
            raise MoeplanError("--template: expected alone")
        if template.is_file() and read_text(template) not in ("", TEMPLATE):
            raise MoeplanError(f"--template {template}: it is there already and was changed; give another name")
        write_atomically(template, lambda file: file.write(TEMPLATE.encode()))
        say(f"wrote {template}; `moeplan cluster {template}` makes a cluster of it")
        return
    described = _described(description, device, between)
    source = tables_of(tables)
    command = shlex.join(["moeplan", *sys.argv[1:]])[:1000]
    made = cluster_of(described, source.tables.system, source.name, command)
    if add is not None:
        rate = parse_rate(between, "--between") if between else _slowest(made)
        made = joined(made, Cluster.read(add), rate)
    made.write(output)
    if as_json:
        print_json(made.model_dump(mode="json"))
        return
    out.print(made_table(made))
    say(f"wrote {output}; plan with `moeplan solve --model MODEL --cluster {output} --workload serve:isl=1024,osl=512`")


def _described(description: Path | None, device: list[str] | None, between: str | None) -> Described:
    if (description is None) == (not device):
        raise MoeplanError("name either a description (FILE.yaml) or GPUs (--device KIND:HOSTSxGPUS)")
    if description is not None:
        found = read_described(description)
        return found.model_copy(update={"between": between}) if between else found
    return Described(devices=tuple(parse_device(text) for text in device or ()), between=between)


def _slowest(made: Cluster) -> float:
    """Bytes per second of the slowest link between hosts."""
    return min(link.bandwidth for link in made.link_classes)

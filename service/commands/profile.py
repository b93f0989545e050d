"""``moeplan profile``: measure devices and links."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ...spec.catalogue import load_model
from ...spec.cluster import Cluster, Link
from ..console import err, out, print_json, progress

DEFAULT_MODELS = ["mixtral", "tiny-moe"]


def profile(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="Measure the operators of this model (catalogue name or config.json); repeatable."
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="f32, bf16 or f16; by default each model's own.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Local ranks: 2 on a CPU, all GPUs on CUDA.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
    lab: Annotated[Path | None, typer.Option(help="Measure inside the emulated cluster of this YAML file.")] = None,
    budget: Annotated[
        float, typer.Option(min=5, help="Seconds to spend, about; two fifths more if it waits for others.")
    ] = 75.0,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Rendezvous port; by default a free one.")] = None,
    accept_noise: Annotated[
        bool, typer.Option("--accept-noise", help="Keep curves that other programs made too noisy to be used.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace the file instead of adding to it.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="The cluster document.")] = Path("cluster.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the document instead of a table.")] = False,
) -> None:
    """Measure every device and link with the operators that the runtime really runs.

    Without --model: Mixtral 8x7B and the tiny example. A second profile on the same devices adds its curves to the
    file. Under torchrun every process is a rank.

    Example: `moeplan profile --model olmoe --ranks 2`
    """
    # torch takes seconds to import: only when it is needed.
    from ...profiler import merge
    from ...profiler import profile as measure
    from ...runtime.launch.choose import choose_launcher, is_primary

    chosen = [load_model(name) for name in model or DEFAULT_MODELS]
    before = Cluster.read(output) if output.exists() and not fresh else None
    with choose_launcher(lab, ranks, device, port) as launcher, progress("profiling") as show:
        cluster = measure(
            launcher, chosen, dtype=dtype, budget_seconds=budget, accept_noise=accept_noise, on_event=show
        )
        if not is_primary(launcher):
            return
    cluster = merge(before, cluster) if before else cluster
    cluster.write(output)
    if as_json:
        print_json(cluster.model_dump(mode="json"))
        return
    out.print(cluster_table(cluster))
    for warning in cluster.provenance.warnings:
        err.print(f"[yellow]note:[/] {warning}", highlight=False)
    out.print(f"wrote {output} in {cluster.provenance.seconds:.0f} s")


def cluster_table(cluster: Cluster) -> Table:
    """Devices with their rates and the links' range."""
    table = Table(title="Cluster", title_justify="left")
    for name in ("device", "host", "kind", "memory", "stream", "slowest link", "latency"):
        table.add_column(name, justify="right" if name in ("memory", "stream", "slowest link", "latency") else "left")
    for i, device in enumerate(cluster.devices):
        outgoing = [link for link in cluster.links if link.source == i]
        rate = min((_bandwidth(link) for link in outgoing), default=None)
        latency = max((link.latency for link in outgoing), default=None)
        share = "" if device.cpu_share == device.threads else f" x {device.cpu_share:g}"
        table.add_row(
            f"{i} {device.name}{share}",
            device.host,
            device.kind,
            f"{device.memory_bytes / 2**30:.1f} GiB",
            f"{device.stream_bandwidth / 1e9:.1f} GB/s",
            "-" if rate is None else f"{rate / 1e6:.0f} MB/s",
            "-" if latency is None else f"{latency * 1e6:.0f} us",
        )
    return table


def _bandwidth(link: Link) -> float:
    return link.curve.axes[0].values[-1] / link.curve.median[-1]

"""``moeplan profile``: measure devices and links."""

import itertools
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from ...spec.catalogue.executed import load_executed
from ...spec.claims import replacing
from ...spec.cluster import Cluster
from ...spec.errors import MoeplanError
from ...spec.output import locked
from ...spec.workload import Workload
from ..console import note, out, print_json, progress, say
from ..options import output_option
from ..pages.tables import WholeTable

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
    workload: Annotated[
        list[str] | None,
        typer.Option(
            "--workload",
            "-w",
            help="Measure this step's sizes too: prefill:TOKENS[@LENGTH] or decode:SEQUENCES[@CONTEXT]; repeatable.",
        ),
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Rendezvous port; by default a free one.")] = None,
    accept_noise: Annotated[
        bool, typer.Option("--accept-noise", help="Keep curves that other programs made too noisy to be used.")
    ] = False,
    offload: Annotated[
        Path | None,
        typer.Option(
            help="Measure this folder's disk too, on every host: `solve` can then plan for experts beyond memory."
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace the file instead of adding to it.")] = False,
    output: Annotated[Path, output_option("The cluster document.")] = Path("cluster.json"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the document instead of a table.")] = False,
) -> None:
    """Measure every device and link with the operators that the runtime really runs.

    Without --model: Mixtral 8x7B and the tiny example. A second profile on the same devices adds its curves to the
    file. Grids reach as far as the time allows; --workload makes sure of a step's own sizes. Under torchrun every
    process is a rank.

    Example: `moeplan profile --model olmoe --ranks 2`
    """
    # torch takes seconds to import: only when it is needed.
    from ...profiler import profile as measure
    from ...runtime.launch.choose import choose_launcher, is_primary

    asked = model or DEFAULT_MODELS
    chosen = [load_executed(name) for name in asked]
    workloads = [Workload.from_text(text) for text in workload or []]
    if not fresh:
        _there(output)  # a file that cannot be added to is said now
    replaced = _mark(output) if fresh else None
    with choose_launcher(lab, ranks, device, port) as launcher, progress("profiling") as show:
        cluster = measure(
            launcher,
            chosen,
            dtype=dtype,
            budget_seconds=budget,
            accept_noise=accept_noise,
            asked=asked,
            workloads=workloads,
            offload=offload,
            on_event=show,
        )
        if not is_primary(launcher):
            return
    cluster = _add(cluster, output, replaced)
    if as_json:
        print_json(cluster.model_dump(mode="json"))
        return
    out.print(cluster_table(cluster))
    for warning in cluster.provenance.warnings:
        note(warning)
    say(f"wrote {output} in {cluster.provenance.seconds:.0f} s")


def _add(cluster: Cluster, output: Path, replaced: tuple[int, int] | None) -> Cluster:
    """What was measured together with what the file holds now: another profile may have ended meanwhile.

    replaced: the mark of a file that ``--fresh`` replaces. What does not go together is written beside it, and said.
    """
    from ...profiler import merge

    with locked(output):
        there = None if replaced is not None and replaced == _mark(output) else _there(output)
        try:
            cluster = merge(there, cluster) if there else cluster
        except MoeplanError as error:
            free = (output.with_stem(f"{output.stem}-{i}") for i in itertools.count(2))
            beside = next(path for path in free if not os.path.lexists(path))
            cluster.write(beside)
            raise MoeplanError(f"{error}; it is in {beside}") from None
        cluster.write(output)
    return cluster


def _there(output: Path) -> Cluster | None:
    """The document in the file, if it holds anything; a device or a pipe does not."""
    with replacing(output):
        return Cluster.read(output) if output.is_file() and output.stat().st_size else None


def _mark(output: Path) -> tuple[int, int]:
    """Which file it is, and of when."""
    try:
        found = output.stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


def cluster_table(cluster: Cluster) -> WholeTable:
    """Devices with their rates and the links' range."""
    table = WholeTable(title="Cluster")
    for name in ("device", "host", "kind", "memory", "stream", "slowest link", "latency"):
        table.add_column(name, justify="right" if name in ("memory", "stream", "slowest link", "latency") else "left")
    for i, device in enumerate(cluster.devices):
        kind = cluster.kind_of(i)
        outgoing = np.unique(cluster.link_class_index([i], np.arange(len(cluster.devices))))
        links = [cluster.link_classes[c] for c in outgoing.tolist() if c >= 0]
        rate = min((link.bandwidth for link in links), default=None)
        latency = max((link.latency for link in links), default=None)
        share = "" if kind.cpu_share == kind.threads else f" x {kind.cpu_share:g}"
        table.add_row(
            f"{i} {kind.product}{share}",
            device.host,
            kind.type,
            f"{device.memory_bytes / 2**30:.1f} GiB",
            f"{kind.stream_bandwidth / 1e9:.1f} GB/s",
            "-" if rate is None else f"{rate / 1e6:.0f} MB/s",
            "-" if latency is None else f"{latency * 1e6:.0f} us",
        )
    return table

"""What a cluster is, as tables: kinds, link classes, and what an equal exchange waits for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.text import Text

from ...planner.topology import Load
from ...planner.units import bytes_text, seconds_text
from ...spec.cluster import SCOPES, Cluster
from .tables import WholeTable

SHOWN = 8  # rows of a table
PROBE = 1 << 20  # bytes that every device sends each other one
NAMED = 3  # exceptions of a link class that are named


def rate_text(rate: float | None) -> str:
    """Bytes per second as people read them."""
    if rate is None:
        return "not known"
    for unit, size in (("TB/s", 1e12), ("GB/s", 1e9)):
        if rate >= size:
            return f"{rate / size:.3g} {unit}"
    return f"{rate / 1e6:.3g} MB/s"


def cluster_page(cluster: Cluster, group: Sequence[int], found: Sequence[Load]) -> Group:
    """found: what an equal exchange of the group puts on each edge, the bottleneck first."""
    parts: list[RenderableType] = [_verdict(cluster, group, found), _kinds(cluster)]
    if cluster.link_classes:
        parts.append(_links(cluster))
    if any(load.rate for load in found):
        parts.append(_loads(group, found))
    return Group(*parts)


def cluster_body(cluster: Cluster, group: Sequence[int], found: Sequence[Load]) -> dict[str, Any]:
    """The same for programs."""
    counts = np.bincount(cluster.kind_index, minlength=len(cluster.kinds)).tolist()
    return {
        "devices": len(cluster.devices),
        "hosts": len(cluster.hosts),
        "kinds": [{"name": kind.name, "devices": count} for kind, count in zip(cluster.kinds, counts, strict=True)],
        "links": [
            {"scope": SCOPES[scope], "link": cluster.link_classes[link].name, "pairs": count}
            for scope, link, count in _pairs(cluster)
        ],
        "group": list(group),
        "edges": [load._asdict() for load in found],
    }


def _verdict(cluster: Cluster, group: Sequence[int], found: Sequence[Load]) -> Text:
    counts = f"{len(cluster.devices)} device(s) of {len(cluster.kinds)} kind(s) on {len(cluster.hosts)} host(s)\n"
    text = Text(counts, style="bold")
    known = [load for load in found if load.rate]
    if known:
        worst = known[0]
        text.append(
            f"An equal exchange of {len(group)} devices waits for {worst.edge[0]} to {worst.edge[1]}: {worst.pairs} of "
            f"{len(group) * (len(group) - 1)} transfers go through it, at {rate_text(worst.rate)}.\n"
        )
    elif found:
        text.append("No rate of what lies between the devices is known.\n")
    return text


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> WholeTable:
    table = WholeTable(title=title, box=box.SIMPLE_HEAD)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _kinds(cluster: Cluster) -> WholeTable:
    table = _table("device kinds", ("kind", "product", "type"), ("devices", "memory", "stream", "curves"))
    memory = np.array([device.memory_bytes for device in cluster.devices])
    for i, kind in enumerate(cluster.kinds[:SHOWN]):
        of = memory[cluster.kind_index == i]
        least = f"{bytes_text(int(of.min()))}" if len(of) else "-"
        share = "" if kind.cpu_share == kind.threads else f" x {kind.cpu_share:g}"
        stream, curves = rate_text(kind.stream_bandwidth), len(kind.operators)
        table.add_row(kind.name, kind.product + share, kind.type, str(len(of)), least, stream, str(curves))
    return _with_rest(table, len(cluster.kinds))


def _pairs(cluster: Cluster) -> list[tuple[int, int, int]]:
    """Scope, link class and ordered pairs, for all that there are."""
    counts = cluster.link_counts()
    return [(int(scope), int(link), int(counts[scope, link])) for scope, link in np.argwhere(counts)]


def _links(cluster: Cluster) -> WholeTable:
    table = _table("links", ("scope", "class"), ("ordered pairs", "latency", "rate"))
    pairs = _pairs(cluster)
    for scope, link, count in pairs[:SHOWN]:
        found = cluster.link_classes[link]
        name = found.name + _exceptions(cluster, scope, found.name)
        table.add_row(SCOPES[scope], name, f"{count:,}", seconds_text(found.latency), rate_text(found.bandwidth))
    return _with_rest(table, len(pairs))


def _exceptions(cluster: Cluster, scope: int, link: str) -> str:
    """Which pairs of devices have this link against the rules."""
    own = [one for one in cluster.link_exceptions if one.link == link]
    pairs = [f"{e.source} to {e.target}" for e in own if int(cluster.scope_index([e.source], [e.target])[0]) == scope]
    more = f", {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
    return f" (exception: {', '.join(pairs[:NAMED])}{more})" if pairs else ""


def _loads(group: Sequence[int], found: Sequence[Load]) -> WholeTable:
    title = f"what an equal exchange of {len(group)} devices goes through"
    table = _table(title, ("from", "to"), ("transfers", "rate", f"{bytes_text(PROBE)} each"))
    for load in found[:SHOWN]:
        seconds = seconds_text(load.seconds * PROBE) if load.rate else "-"
        table.add_row(*load.edge, f"{load.pairs:,}", rate_text(load.rate), seconds)
    return _with_rest(table, len(found))


def _with_rest(table: WholeTable, rows: int) -> WholeTable:
    if rows > SHOWN:
        table.caption, table.caption_justify = f"and {rows - SHOWN} more", "left"
    return table

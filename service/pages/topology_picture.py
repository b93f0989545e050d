"""A cluster's topology drawn: devices at the bottom, the network on top, wires with what they carry."""

from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...planner.topology import Edge, Load, exceptions, routes
from ...spec.cluster import Cluster
from ...spec.cluster.topology import device_node
from ...spec.picture import plain, save_picture
from .cluster import rate_text

if TYPE_CHECKING:
    import networkx as nx
    from matplotlib.axes import Axes

MOST_DRAWN = 48  # devices; of more, hosts that are alike are drawn once
MOST_LABELS = 28  # wires with their rates written beside them
MOST_EXCEPTIONS = 12  # the slowest ones
DEPTHS = 4  # that the bows of exceptions take in turn, so that their labels do not lie on each other
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#eeca3b", "#72b7b2", "#9d755d", "#e45756")
LIMIT, WIRE, UNKNOWN = "#d62728", "#555555", "#bbbbbb"
FILLS = {"switch": "#dfe9f3", "nvlink": "#e3f1dd", "numa": "#f3efdf", "host": "#eeeeee", "nic": "#fbe6d4"}


def draw_topology(cluster: Cluster, graph: "nx.DiGraph", found: Sequence[Load], path: Path) -> None:
    """found: the loads of an equal exchange; the wires that take longest are red. The file's ending is the format."""
    from matplotlib.figure import Figure

    drawn, notes = drawn_devices(cluster)
    part = graph if len(drawn) == len(cluster.devices) else graph.subgraph(between(graph, drawn))
    at = positions(part, cluster, drawn)
    levels = {y for _, y in at.values()}
    width = min(max(7.0, 0.62 * len(drawn) + 2.5), 24.0)
    figure = Figure(figsize=(width, 1.6 + 1.15 * len(levels)), layout="constrained")
    axes = figure.subplots()
    slowest = max((load.seconds for load in found), default=0.0)
    limits = {frozenset(load.edge) for load in found if load.rate and load.seconds >= 0.999 * slowest}
    differing = exceptions(cluster, drawn)
    if len(differing) > MOST_EXCEPTIONS:
        notes.append(f"{len(differing) - MOST_EXCEPTIONS} more links differ from their class, and are not drawn")
    _draw_wires(axes, part, at, limits)
    _draw_exceptions(axes, differing[:MOST_EXCEPTIONS], at, limits)
    _draw_nodes(axes, part, at, cluster)
    axes.set_title(_title(cluster, notes), fontsize=11, loc="left")
    axes.margins(x=0.06, y=0.12)
    axes.axis("off")
    save_picture(figure, path)


def _title(cluster: Cluster, notes: Sequence[str]) -> str:
    title = f"{len(cluster.devices)} devices of {len(cluster.kinds)} kind(s) on {len(cluster.hosts)} host(s)"
    return "\n".join(map(plain, [title, *notes]))


def drawn_devices(cluster: Cluster) -> tuple[list[int], list[str]]:
    """The devices to draw, and what is left out: of many, the first host of those that are alike."""
    everyone = list(range(len(cluster.devices)))
    if len(everyone) <= MOST_DRAWN:
        return everyone, []
    of_host = [np.flatnonzero(cluster.host_index == host).tolist() for host in range(len(cluster.hosts))]
    alike: dict[tuple, list[int]] = {}
    for host, members in enumerate(of_host):
        same = tuple((cluster.devices[i].kind, cluster.devices[i].switch) for i in members)
        uplinks = cluster.hosts[host].uplink_out, cluster.hosts[host].uplink_in
        alike.setdefault((same, *uplinks), []).append(host)
    drawn, notes = list[int](), list[str]()
    for hosts in alike.values():
        if not drawn or len(drawn) + len(of_host[hosts[0]]) <= MOST_DRAWN:
            drawn += of_host[hosts[0]][:MOST_DRAWN]
            notes.append(f"{cluster.hosts[hosts[0]].name} stands for {len(hosts)} host(s) that are alike")
    left = len(alike) - len(notes)
    return drawn, [*notes[:4], *([f"{left} other kind(s) of hosts are not drawn"] if left else [])]


def between(graph: "nx.DiGraph", drawn: Sequence[int]) -> set[str]:
    """The nodes that the drawn devices' transfers go through, and what their hosts hang on."""
    import networkx as nx

    nodes = {device_node(i) for i in drawn}
    for edges in routes(graph, permutations(drawn, 2)).values():
        nodes |= {node for edge in edges for node in edge}
    top = [name for name, type in graph.nodes(data="type") if type == "network"]
    for name in top[:1]:
        nodes |= {node for i in drawn for node in nx.shortest_path(graph, device_node(i), name, weight="cost")}
    return nodes


def positions(part: "nx.DiGraph", cluster: Cluster, drawn: Sequence[int]) -> dict[str, tuple[float, float]]:
    """x: devices in a row, all else above the middle of the devices nearest to it; y: hops to the nearest device."""
    import networkx as nx

    host = cluster.host_index[list(drawn)]
    spots = np.arange(len(drawn)) + 0.8 * np.cumsum(np.append(0, host[1:] != host[:-1]))
    at = {device_node(i): (float(x), 0.0) for i, x in zip(drawn, spots, strict=True)}
    devices = list(at)
    hops = {name: nx.multi_source_dijkstra_path_length(part, {name}, weight=None) for name in part if name not in at}
    levels: dict[float, list[tuple[float, str]]] = {}
    for name, far in hops.items():
        near = min((far[device] for device in devices if device in far), default=1)
        reached = [at[device][0] for device in devices if far.get(device) == near]
        y = -1.0 if part.nodes[name]["type"] == "nvlink" else float(near)
        levels.setdefault(y, []).append((float(np.mean(reached or spots)), name))
    for y, row in levels.items():
        for x, name in _apart(sorted(row)):
            at[name] = x, y
    return at


def _apart(row: Sequence[tuple[float, str]]) -> Iterator[tuple[float, str]]:
    """The same row with space for a name between neighbours."""
    last = -np.inf
    for x, name in row:
        last = max(x, last + 1.6)
        yield float(last), name


def _draw_wires(axes: "Axes", part: "nx.DiGraph", at: dict[str, tuple[float, float]], limits: set[frozenset]) -> None:
    wires: dict[frozenset, Edge] = {frozenset(edge): edge for edge in part.edges}
    rates = [rate for *_, rate in part.edges(data="rate") if rate]
    for ends, (a, b) in wires.items():
        there, back = part.edges[a, b]["rate"], part.edges[b, a]["rate"]
        (x0, y0), (x1, y1) = at[a], at[b]
        known = [rate for rate in (there, back) if rate]
        wide = 1.0 + 3.0 * np.log(min(known) / min(rates)) / max(np.log(max(rates) / min(rates)), 1.0) if known else 1.0
        colour = LIMIT if ends in limits else WIRE if known else UNKNOWN
        axes.plot([x0, x1], [y0, y1], color=colour, linewidth=wide, linestyle="-" if known else "--", zorder=1)
        if len(wires) <= MOST_LABELS and known:
            text = rate_text(min(known)) if there == back else f"{rate_text(there)} / {rate_text(back)}"
            part_way = 0.3 if y0 == 0 else 0.7 if y1 == 0 else 0.5  # wires are further apart near the devices
            x, y = x0 + part_way * (x1 - x0), y0 + part_way * (y1 - y0)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            axes.text(x, y, text, fontsize=6.5, color=colour, ha="center", va="center", zorder=2, bbox=box)


def _draw_exceptions(
    axes: "Axes", differing: Sequence[Load], at: dict[str, tuple[float, float]], limits: set[frozenset]
) -> None:
    """Bows below the devices, each with the two devices and what was measured between them."""
    t = np.linspace(0.0, 1.0, 33)
    for i, load in enumerate(differing):
        (x0, _), (x1, _) = (at[name] for name in load.edge)
        deep = 0.4 + 0.2 * (i % DEPTHS)
        colour = LIMIT if frozenset(load.edge) in limits else WIRE
        axes.plot(x0 + t * (x1 - x0), -4 * deep * t * (1 - t), color=colour, linestyle=":", linewidth=1.6, zorder=1)
        source, target = (name.removeprefix("device ") for name in load.edge)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        text = f"{source} to {target}: {rate_text(load.rate)}"
        axes.text((x0 + x1) / 2, -deep, text, fontsize=6.5, color=colour, ha="center", va="center", zorder=2, bbox=box)
    if differing:
        axes.plot([], [], color=WIRE, linestyle=":", label="differs from its class, as measured")


def _draw_nodes(axes: "Axes", part: "nx.DiGraph", at: dict[str, tuple[float, float]], cluster: Cluster) -> None:
    kinds = dict[int, None]()
    for name, (x, y) in at.items():
        text, fill, colour = name, FILLS.get(part.nodes[name]["type"], "white"), "black"
        if part.nodes[name]["type"] == "device":
            text, colour = name.removeprefix("device "), "white"
            kind = int(cluster.kind_index[int(text)])
            kinds[kind] = None
            fill = COLOURS[kind % len(COLOURS)]
        text = plain(text if len(text) <= 24 else f"{text[:21]}...")
        box = {"boxstyle": "round,pad=0.35", "facecolor": fill, "edgecolor": "#444444", "linewidth": 0.7}
        axes.text(x, y, text, fontsize=8, color=colour, ha="center", va="center", zorder=3, bbox=box)
    xs, ys = zip(*at.values(), strict=True)
    axes.scatter(xs, ys, s=1, alpha=0)  # texts alone do not widen the axes
    for kind in list(kinds)[: len(COLOURS)]:
        label = plain(cluster.kinds[kind].name[:40])
        axes.scatter([], [], marker="s", color=COLOURS[kind % len(COLOURS)], label=label)
    axes.plot([], [], color=LIMIT, label="limits an equal exchange")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.02), ncols=4)

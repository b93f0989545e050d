"""A cluster's topology: devices at the bottom, what they hang on above them, wires with what they carry."""

from typing import Any

from ....planner.topology import exceptions, exchange_loads, graph_of
from ....spec.cluster import Cluster
from ....spec.cluster.topology import device_node
from ...pages.cluster import rate_text
from ...pages.topology_picture import between, drawn_devices, positions
from .figure import COLOURS, RED, Figure, Row, View, plain, readable

MOST_LABELS = 28  # wires with their rates written beside them
LISTED = 40  # wires in the table
SHAPES = {"device": "square", "switch": "diamond", "nvlink": "hexagon", "network": "circle", "rack": "circle"}


def topology_figure(cluster: Cluster) -> Figure:
    """The wires that an equal exchange of all devices waits for are red and thick."""
    graph = graph_of(cluster)
    devices, notes = drawn_devices(cluster)
    part = graph if len(devices) == len(cluster.devices) else graph.subgraph(between(graph, devices))
    at = positions(part, cluster, devices)
    found = exchange_loads(cluster, graph, range(len(cluster.devices)))
    known = [load for load in found if load.rate]
    limits = {frozenset(load.edge) for load in known if load.seconds >= 0.999 * known[0].seconds}
    differing = [(frozenset(load.edge), load.rate) for load in exceptions(cluster, devices)]
    wires = {frozenset(edge): edge for edge in part.edges}
    rows: list[Row] = [
        (readable(a), readable(b), rate_text(there) if there == back else f"{rate_text(there)} / {rate_text(back)}")
        for a, b in list(wires.values())[:LISTED]
        for there, back in ((part.edges[a, b]["rate"], part.edges[b, a]["rate"]),)
    ]
    rows += [(*map(readable, sorted(ends)), f"{rate_text(rate)}, measured apart") for ends, rate in differing[:LISTED]]
    says = f"{len(cluster.devices)} devices of {len(cluster.kinds)} kinds on {len(cluster.hosts)} hosts."
    if known:
        source, target = known[0].edge
        says += (
            f" An equal exchange of all waits for {readable(source)} to {readable(target)}, at "
            f"{rate_text(known[0].rate)}."
        )
    levels = len({y for _, y in at.values()})
    data = [*_wires(part, wires, at, limits), *_nodes(part, cluster, at)]
    return Figure(
        "topology",
        "Topology of the cluster",
        " ".join([says, *(f"{readable(note)}." for note in notes)]),
        ("from", "to", "rate"),
        [View("all", data, rows)],
        {
            "xaxis": {"visible": False},
            "yaxis": {"visible": False},
            "hovermode": "closest",
            "margin": {"r": 70},
            "legend": {"orientation": "h", "y": -0.05, "yanchor": "top"},
        },
        height=min(640, 200 + 75 * levels),
    )


def _wires(part: Any, wires: dict, at: dict, limits: set[frozenset]) -> list[dict]:
    """Lines that limit an exchange, and the others; in the middle of each a mark that says what it carries."""
    found = []
    for limiting, name in ((False, "wire"), (True, "limits an equal exchange")):
        x: list[float | None] = []
        y: list[float | None] = []
        marks: list[tuple[float, float, str]] = []
        for ends, (a, b) in wires.items():
            if (ends in limits) != limiting:
                continue
            (x0, y0), (x1, y1) = at[a], at[b]
            x += [x0, x1, None]
            y += [y0, y1, None]
            along = 0.3 if y0 == 0 else 0.7 if y1 == 0 else 0.5  # wires are further apart near the devices
            rate = part.edges[a, b]["rate"]
            marks.append((x0 + along * (x1 - x0), y0 + along * (y1 - y0), f" {rate_text(rate)}" if rate else ""))
        if not x:
            continue
        line = {"color": RED, "width": 4} if limiting else {"color": "#8c8c8c", "width": 1.5}
        shared: dict[str, Any] = {"type": "scatter", "legendgroup": name}
        found.append(shared | {"mode": "lines", "x": x, "y": y, "line": line, "name": name, "hoverinfo": "skip"})
        if len(wires) <= MOST_LABELS:
            xs, ys, texts = (list(column) for column in zip(*marks, strict=True))
            labels = {"mode": "text", "x": xs, "y": ys, "text": texts, "textfont": {"size": 10}, "hoverinfo": "skip"}
            labels |= {"textposition": "middle right", "meta": "wide"}
            found.append(shared | labels | {"showlegend": False})
    return found


def _nodes(part: Any, cluster: Cluster, at: dict) -> list[dict]:
    """One trace for each kind of device, one for what lies between them."""
    kinds: dict[int, list[str]] = {}
    of = {device_node(i): i for i in range(len(cluster.devices))}
    for name in at:
        kinds.setdefault(int(cluster.kind_index[of[name]]) if name in of else -1, []).append(name)
    found = []
    for kind, names in sorted(kinds.items(), reverse=True):
        types = [part.nodes[name]["type"] for name in names]
        own = [_shown(name) for name in names]
        found.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": [at[name][0] for name in names],
                "y": [at[name][1] for name in names],
                "text": own,
                "textposition": "middle center" if kind >= 0 else "middle right",
                "textfont": {"size": 11, "color": "#ffffff"} if kind >= 0 else {"size": 11},
                "hovertext": [_hover(cluster, of.get(name), name) for name in names],
                "hoverinfo": "text",
                "cliponaxis": False,
                "marker": {
                    "symbol": [SHAPES.get(type, "circle") for type in types],
                    "size": 24 if kind >= 0 else 11,
                    "color": COLOURS[kind % len(COLOURS)] if kind >= 0 else "#8c8c8c",
                },
                "name": plain(cluster.kinds[kind].name) if kind >= 0 else "between devices",
            }
        )
    return found


def _shown(name: str) -> str:
    return plain(name.removeprefix("device ")[:24]) if name.startswith("device ") else f" {plain(name[:24])}"


def _hover(cluster: Cluster, device: int | None, name: str) -> str:
    if device is None:
        return plain(name)
    own = cluster.devices[device]
    return f"device {device} on {plain(own.host)}<br>{plain(own.kind)}"

"""The graph of what lies between devices: which transfers share what, and what limits a group.

Nodes have a ``type`` (device, switch, nvlink, numa, host, nic, rack, network). Edges are directed and have a ``rate``
in bytes per second, None where nothing is known of it. The graph is the document's ``topology`` where it has one,
else it is made of what the document says: a device hangs on its switch, the switch on the NUMA node, that on the
host, the host through its network card on the rack and the network; GPUs with NVLink hang on that too. Rates are the
measured ones of uplinks, PCIe's own by generation and width, and else the fastest link that was measured through the
edge, alone: what it carries at least.

A transfer takes the fewest edges, and of equally many the faster ones.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..spec.cluster import SCOPES, Cluster, Device
from ..spec.cluster.nvml import has_nvlink, pcie_rate
from ..spec.cluster.topology import device_node, host_node

if TYPE_CHECKING:
    import networkx as nx

AT_ONCE = 256  # sources whose routes are looked at together

Edge = tuple[str, str]
Transfer = tuple[int, int]
"""Source and target device."""


class Load(NamedTuple):
    """What an equal exchange puts on one edge: ``pairs`` of the group go through it; seconds for one byte of each."""

    edge: Edge
    pairs: int
    rate: float | None
    seconds: float


def graph_of(cluster: Cluster) -> "nx.DiGraph":
    """The directed graph of a cluster; node ``device i`` is device i."""
    import networkx as nx

    graph = nx.DiGraph()
    for i in range(len(cluster.devices)):
        graph.add_node(device_node(i), type="device")
    if cluster.topology is not None:
        for host in cluster.hosts:
            graph.add_node(host_node(host.name), type="host")
        for node in cluster.topology.nodes:
            graph.add_node(node.name, type=node.type)
        for edge in cluster.topology.edges:
            _wire(graph, edge.source, edge.target, edge.rate, edge.rate_back or edge.rate)
        graph.remove_nodes_from([name for name in list(graph) if graph.degree(name) == 0])
        return graph
    inside, within_switch = _measured_rates(cluster)
    for i, device in enumerate(cluster.devices):
        _hang(graph, i, device, inside[i], within_switch[i])
    _join_hosts(graph, cluster)
    return graph


def routes(graph: "nx.DiGraph", transfers: Iterable[Transfer]) -> dict[Transfer, list[Edge]]:
    """The edges that each transfer takes, in order."""
    transfers = list(transfers)
    table = _Routes(graph, sorted({source for source, _ in transfers}))
    return {transfer: table.edges(*transfer) for transfer in transfers}


def loads(graph: "nx.DiGraph", group: Sequence[int]) -> list[Load]:
    """What every edge has to carry when each device of a group sends each other one byte; the bottleneck first.

    Edges of unknown rate come last. Loads of edges are counted from the routes of all pairs, ``AT_ONCE`` sources at a
    time.
    """
    counts: dict[Edge, int] = {}
    for first in range(0, len(group), AT_ONCE):
        for edge, pairs in _Routes(graph, group[first : first + AT_ONCE]).loads(group).items():
            counts[edge] = counts.get(edge, 0) + pairs
    rates = {edge: graph.edges[edge]["rate"] for edge in counts}
    return _slowest_first(
        Load(e, pairs, rates[e], pairs / rates[e] if rates[e] else 0.0) for e, pairs in counts.items()
    )


def exchange_loads(cluster: Cluster, graph: "nx.DiGraph", group: Sequence[int]) -> list[Load]:
    """``loads``, and the links that were measured to differ from their rules: one pair each, at the link's own rate.

    The graph's edges carry what the fastest transfer reached, so that it cannot tell a bad cable.
    """
    return _slowest_first([*loads(graph, group), *exceptions(cluster, group)])


def exceptions(cluster: Cluster, group: Sequence[int]) -> list[Load]:
    """The measured exceptions between devices of a group, the slowest first."""
    members, found = set(group), []
    for one in cluster.link_exceptions:
        if one.source in members and one.target in members:
            rate = cluster.link(one.source, one.target).bandwidth
            found.append(Load((device_node(one.source), device_node(one.target)), 1, rate, 1 / rate))
    return _slowest_first(found)


def _slowest_first(found: Iterable[Load]) -> list[Load]:
    return sorted(found, key=lambda load: (-load.seconds, load.edge))


class _Routes:
    """Shortest paths from some devices to all nodes."""

    def __init__(self, graph: "nx.DiGraph", sources: Sequence[int]) -> None:
        import networkx as nx
        from scipy.sparse.csgraph import dijkstra

        self.names = list(graph)
        self.at = {name: i for i, name in enumerate(self.names)}
        self.row = {source: i for i, source in enumerate(sources)}
        start = [self.at[device_node(source)] for source in sources]
        weights = nx.to_scipy_sparse_array(graph, nodelist=self.names, weight="cost", format="csr")
        self.far, self.before = dijkstra(weights, indices=start, return_predecessors=True)

    def edges(self, source: int, target: int) -> list[Edge]:
        before, node = self.before[self.row[source]], self.at[device_node(target)]
        found = list[Edge]()
        while before[node] >= 0:
            found.append((self.names[before[node]], self.names[node]))
            node = int(before[node])
        return found[::-1]

    def loads(self, group: Sequence[int]) -> dict[Edge, int]:
        """How many of the group's devices each edge is on the way to, over all sources.

        A node passes what arrives for those behind it on to the node before: the furthest nodes first.
        """
        arriving = np.zeros(self.far.shape, np.int64)
        arriving[:, [self.at[device_node(device)] for device in group]] = 1
        hops = np.round(np.where(np.isfinite(self.far), self.far, -1)).astype(int)
        total: dict[Edge, int] = {}
        for hop in range(hops.max(), 0, -1):
            row, node = np.nonzero((hops == hop) & (arriving > 0))
            before = self.before[row, node]
            passed = arriving[row, node]
            np.add.at(arriving, (row, before), passed)
            edges, which = np.unique(before.astype(np.int64) * len(self.names) + node, return_inverse=True)
            for edge, pairs in zip(edges.tolist(), np.bincount(which, passed).tolist(), strict=True):
                key = self.names[edge // len(self.names)], self.names[edge % len(self.names)]
                total[key] = total.get(key, 0) + int(pairs)
        return total


def _wire(graph: "nx.DiGraph", a: str, b: str, rate: float | None, back: float | None) -> None:
    """Both directions. An edge costs one hop and a little, which is the less the faster it is."""
    for source, target, carries in ((a, b, rate), (b, a, back)):
        graph.add_edge(source, target, rate=carries, cost=1 + 1e-4 / (1 + (carries or 0.0) / 1e9))


def _hang(graph: "nx.DiGraph", i: int, device: Device, inside: float | None, within: float | None) -> None:
    """Everything from one device to its host. inside, within: its fastest link in the host, and below its switch."""
    host, details = host_node(device.host), device.details
    graph.add_node(host, type="host")
    above = host
    nvlink = has_nvlink(details)
    through = None if nvlink else inside  # what was measured went over NVLink there
    if "numa_node" in details:
        above = f"numa {details['numa_node']} of {device.host}"
        graph.add_node(above, type="numa")
        _widen(graph, above, host, through)
    if device.switch is not None:
        node = f"switch {device.switch} of {device.host}"
        graph.add_node(node, type="switch")
        _widen(graph, node, above, through)
        above = node
    fastest = max((rate for rate in (inside, within) if rate is not None), default=None)
    rate = pcie_rate(details) or (None if nvlink else fastest)
    _wire(graph, device_node(i), above, rate, rate)
    if nvlink:
        node = f"nvlink of {device.host}"
        graph.add_node(node, type="nvlink")
        _wire(graph, device_node(i), node, fastest, fastest)


def _widen(graph: "nx.DiGraph", a: str, b: str, rate: float | None) -> None:
    """The edge, with the fastest rate that anything measured through it."""
    known = graph.edges[a, b]["rate"] if graph.has_edge(a, b) else None
    rates = [value for value in (known, rate) if value is not None]
    _wire(graph, a, b, max(rates, default=None), max(rates, default=None))


def _join_hosts(graph: "nx.DiGraph", cluster: Cluster) -> None:
    used = {device.host for device in cluster.devices}
    hosts = [host for host in cluster.hosts if host.name in used]
    if len(hosts) == 1:
        return
    graph.add_node("network", type="network")
    for host in hosts:
        nic, above = f"nic of {host.name}", "network"
        graph.add_node(nic, type="nic")
        _wire(graph, host_node(host.name), nic, None, None)
        if host.rack is not None:
            above = f"rack {host.rack}"
            graph.add_node(above, type="rack")
            if not graph.has_edge(above, "network"):
                _wire(graph, above, "network", None, None)
        _wire(graph, nic, above, host.uplink_out, host.uplink_in)


def _measured_rates(cluster: Cluster) -> tuple[list[float | None], list[float | None]]:
    """Of each device the fastest link to another switch of its host, and below its own switch."""
    rates = np.array([link.bandwidth for link in cluster.link_classes] or [0.0])
    found: tuple[list[float | None], list[float | None]] = ([], [])
    peers = [np.flatnonzero(cluster.host_index == host) for host in range(len(cluster.hosts))]
    for i, host in enumerate(cluster.host_index.tolist()):
        others = peers[host][peers[host] != i]
        rate = rates[cluster.link_class_index([i], others)]
        scope = cluster.scope_index([i], others)
        for name, column in zip(("host", "switch"), found, strict=True):
            here = rate[scope == SCOPES.index(name)]
            column.append(float(here.max()) if len(here) else None)
    return found

"""What lies between devices: made from the document or written by hand, routes, and what limits a group."""

from collections import Counter
from itertools import pairwise, permutations
from typing import Any

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.topology import graph_of, loads, routes
from moeplan.spec import Cluster
from moeplan.spec.cluster import Device, LinkRule, Topology
from moeplan.spec.cluster.nvml import switch_of
from moeplan.tests.documents import cluster_body, refused, text
from moeplan.tests.synthetic import cluster, tiny_model


def wire(source: str, target: str, rate: float | None = None, back: float | None = None) -> dict[str, Any]:
    return {"source": source, "target": target, "rate": rate, "rate_back": back}


def by_hand(devices: int, nodes: list[dict[str, str]], edges: list[dict[str, Any]]) -> Cluster:
    base = cluster(tiny_model(), ((1.0,) * devices,))
    topology = {"nodes": nodes, "edges": edges}
    return Cluster.model_validate(base.model_dump(mode="json") | {"topology": topology})


def test_the_uplink_of_two_hosts_is_shared_and_limits() -> None:
    graph = graph_of(cluster(tiny_model(), ((1.0, 1.0), (1.0, 1.0)), local=4e9, uplink=1e9))
    assert {graph.nodes[name]["type"] for name in graph} == {"device", "host", "nic", "network"}
    taken = routes(graph, [(0, 1), (0, 2)])
    assert taken[0, 1] == [("device 0", "host host0"), ("host host0", "device 1")]
    assert len(taken[0, 2]) == 6
    takers = Counter(edge for edges in routes(graph, [(0, 2), (1, 3), (2, 0)]).values() for edge in edges)
    assert takers["nic of host0", "network"] == 2
    assert takers["device 0", "host host0"] == 1
    worst = loads(graph, (0, 1, 2, 3))[0]
    assert (worst.pairs, worst.rate, worst.seconds) == (4, 1e9, 4e-9)
    assert worst.edge in {(f"nic of host{h}", "network") for h in (0, 1)} | {
        ("network", f"nic of host{h}") for h in (0, 1)
    }
    inside = loads(graph, (0, 1))[0]
    assert inside.rate == pytest.approx(4e9, rel=0.1)


def test_switches_and_racks_are_nodes() -> None:
    made = cluster(tiny_model(), ((1.0,) * 4,) * 4, switches=2)
    hosts = tuple(host.model_copy(update={"rack": f"r{i // 2}"}) for i, host in enumerate(made.hosts))
    rules = (*made.link_rules, LinkRule(scope="rack", link="host"))
    graph = graph_of(made.model_copy(update={"hosts": hosts, "link_rules": rules}))
    names = [edge[1] for edge in routes(graph, [(0, 2)])[0, 2]]
    assert names == ["switch 0 of host0", "host host0", "switch 1 of host0", "device 2"]
    assert [edge[1] for edge in routes(graph, [(0, 4)])[0, 4]][3:5] == ["rack r0", "nic of host1"]
    assert ("rack r0", "network") in routes(graph, [(0, 15)])[0, 15]


def gpu(i: int, **details: str) -> Device:
    return Device(kind="speed 1", host="host0", switch=switch_of(details), memory_bytes=2**30, details=details)


def test_what_nvml_says_becomes_switches_numa_nodes_and_nvlink() -> None:
    base = cluster(tiny_model(), ((1.0,) * 4,), switches=2)
    near = {0: "PIX", 1: "PIX", 2: "SYS", 3: "SYS"}

    def topology(i: int) -> str:
        others = [j for j in range(4) if j != i]
        return ", ".join(f"gpu{j}: {near[i] if i // 2 == j // 2 else 'SYS'}" for j in others)

    facts = {"pcie_generation": "5", "pcie_width": "16"}
    devices = [gpu(i, topology=topology(i), numa_node=str(i // 2), **facts) for i in range(4)]
    graph = graph_of(base.model_copy(update={"devices": tuple(devices)}))
    assert routes(graph, [(0, 1)])[0, 1] == [
        ("device 0", "switch gpu0 of host0"),
        ("switch gpu0 of host0", "device 1"),
    ]
    assert graph.edges["device 0", "switch gpu0 of host0"]["rate"] == pytest.approx(63e9, rel=0.01)
    assert [edge[1] for edge in routes(graph, [(0, 2)])[0, 2]] == [
        "switch gpu0 of host0",
        "numa 0 of host0",
        "host host0",
        "numa 1 of host0",
        "device 2",
    ]
    linked = [gpu(i, topology=topology(i), nvlinks="18", **facts) for i in range(4)]
    graph = graph_of(base.model_copy(update={"devices": tuple(linked)}))
    assert {edge[1] for edge in routes(graph, [(0, 2)])[0, 2]} == {"nvlink of host0", "device 2"}
    odd = gpu(0, topology="nonsense, gpux: PIX", pcie_generation="9", numa_node="-1")
    assert graph_of(base.model_copy(update={"devices": (odd, *linked[1:])})).number_of_nodes() > 4


def test_a_topology_by_hand_replaces_what_would_be_made() -> None:
    nodes = [{"name": name, "type": "switch"} for name in ("left", "right")]
    edges = [wire("device 0", "left", 1e9), wire("device 1", "left", 1e9), wire("device 2", "right", 1e9)]
    edges += [wire("device 3", "right", 1e9), wire("left", "right", 5e8, 2e8)]
    graph = graph_of(by_hand(4, nodes, edges))
    assert "host host0" not in graph
    assert loads(graph, range(4))[0] == (("right", "left"), 4, 2e8, 4 / 2e8)
    assert loads(graph, (0, 1))[0].rate == 1e9


@st.composite
def wired(draw) -> Cluster:
    """Devices and switches, a random tree and some wires more, of random rates."""
    devices, switches = draw(st.integers(2, 6)), draw(st.integers(1, 5))
    names = [f"s{i}" for i in range(switches)] + [f"device {i}" for i in range(devices)]
    edges = {frozenset((names[draw(st.integers(0, i - 1))], names[i])) for i in range(1, len(names))}
    pairs = st.tuples(st.sampled_from(names), st.sampled_from(names)).filter(lambda pair: pair[0] != pair[1])
    edges |= {frozenset(pair) for pair in draw(st.lists(pairs, max_size=4))}
    rates = st.sampled_from([None, 1e8, 1e9, 3e9])
    wires = [wire(*sorted(edge), draw(rates), draw(rates)) for edge in sorted(edges, key=sorted)]
    return by_hand(devices, [{"name": f"s{i}", "type": "switch"} for i in range(switches)], wires)


@settings(max_examples=80, deadline=None)
@given(wired())
def test_loads_are_those_of_every_pair_on_a_shortest_path(made: Cluster) -> None:
    graph = graph_of(made)
    group = range(len(made.devices))
    taken = routes(graph, permutations(group, 2))
    counts: dict[tuple[str, str], int] = {}
    for (source, target), edges in taken.items():
        assert edges[0][0] == f"device {source}"
        assert edges[-1][1] == f"device {target}"
        assert all(a[1] == b[0] for a, b in pairwise(edges))
        assert len(edges) == nx.shortest_path_length(graph, f"device {source}", f"device {target}")
        cost = sum(graph.edges[edge]["cost"] for edge in edges)
        assert cost == pytest.approx(nx.shortest_path_length(graph, f"device {source}", f"device {target}", "cost"))
        for edge in edges:
            counts[edge] = counts.get(edge, 0) + 1
    found = loads(graph, group)
    assert {load.edge: load.pairs for load in found} == counts
    assert [load.seconds for load in found] == sorted((load.seconds for load in found), reverse=True)


SWITCH = {"name": "s", "type": "switch"}
BOTH = [wire("device 0", "s", 1e9), wire("device 1", "s", 1e9)]


@pytest.mark.parametrize(
    ("topology", "complaint"),
    [
        ({"nodes": [SWITCH], "edges": BOTH[:1]}, "nothing connects device 1 with device 0: a wire is missing"),
        ({"nodes": [SWITCH], "edges": [*BOTH, wire("s", "device 0")]}, "these two are wired by topology.edges[0]"),
        ({"nodes": [SWITCH], "edges": [*BOTH, wire("s", "s")]}, "edges[2]: 's' is wired to itself"),
        ({"nodes": [SWITCH], "edges": [*BOTH, wire("s", "t")]}, "edges[2]: no node 't'; devices are called 'device 0'"),
        ({"nodes": [SWITCH], "edges": [*BOTH, wire("s", "device 2")]}, "edges[2]: no node 'device 2'"),
        ({"nodes": [SWITCH, SWITCH], "edges": BOTH}, "nodes[1]: there is a node 's' already"),
        ({"nodes": [SWITCH | {"name": "host a"}], "edges": BOTH}, "nodes[0]: there is a node 'host a' already"),
        ({"nodes": [SWITCH | {"type": "hub"}], "edges": BOTH}, "topology.nodes[0].type"),
        ({"nodes": [SWITCH], "edges": [*BOTH[:1], wire("device 1", "s", 0.0)]}, "topology.edges[1].rate"),
        ({"nodes": [], "edges": []}, "topology.edges"),
    ],
)  # fmt: skip
def test_what_a_topology_by_hand_may_not_say(topology: dict[str, Any], complaint: str) -> None:
    assert complaint in refused(Cluster, text(Cluster, cluster_body() | {"topology": topology}))


def test_a_topology_is_kept() -> None:
    topology = {"nodes": [SWITCH], "edges": BOTH}
    found = Cluster.parse(text(Cluster, cluster_body() | {"topology": topology}), "c")
    assert found.topology == Topology.model_validate(topology)
    assert Cluster.parse(found.to_json(), "c") == found

"""What lies between the devices, written by hand: switches, network cards and the wires between them.

Every device and host of the cluster is a node already, called ``device 3`` and ``host a``. Without this part the graph
is made from what the document says of devices, links and hosts (``planner.topology``).
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ..document import Part, show
from .kinds import Host, Rate


class TopologyNode(Part):
    """Something that carries bytes between devices."""

    name: str
    type: Literal["switch", "nvlink", "numa", "nic", "network"]


class TopologyEdge(Part):
    """A wire between two nodes, with what it carries in each direction at once."""

    source: str
    target: str
    rate: Rate | None = Field(None, description="bytes per second from source to target; none: not known")
    rate_back: Rate | None = Field(None, description="bytes per second back; none: the same")


class Topology(Part):
    """All nodes besides devices and hosts, and all wires."""

    nodes: tuple[TopologyNode, ...] = ()
    edges: tuple[TopologyEdge, ...] = Field(min_length=1)

    def check(self, devices: int, hosts: Sequence[Host]) -> None:
        """Raises ValueError where a node is there twice, a wire leads nowhere or twice, or a device is not reached."""
        known = {device_node(i) for i in range(devices)} | {host_node(host.name) for host in hosts}
        for i, node in enumerate(self.nodes):
            if node.name in known:
                raise ValueError(f"topology.nodes[{i}]: there is a node {show(node.name)} already")
            known.add(node.name)
        reached = {name: name for name in known}

        def root(name: str) -> str:
            while reached[name] != name:
                reached[name] = reached[reached[name]]
                name = reached[name]
            return name

        wired: dict[frozenset[str], int] = {}
        for i, edge in enumerate(self.edges):
            where = f"topology.edges[{i}]"
            for end in (edge.source, edge.target):
                if end not in known:
                    raise ValueError(f"{where}: no node {show(end)}; devices are called 'device 0', hosts 'host NAME'")
            ends = frozenset((edge.source, edge.target))
            if len(ends) == 1:
                raise ValueError(f"{where}: {show(edge.source)} is wired to itself")
            if ends in wired:
                raise ValueError(f"{where}: these two are wired by topology.edges[{wired[ends]}] already")
            wired[ends] = i
            reached[root(edge.source)] = root(edge.target)
        for i in range(1, devices):
            if root(device_node(i)) != root(device_node(0)):
                raise ValueError(f"topology.edges: nothing connects device {i} with device 0: a wire is missing")


def device_node(device: int) -> str:
    return f"device {device}"


def host_node(name: str) -> str:
    return f"host {name}"

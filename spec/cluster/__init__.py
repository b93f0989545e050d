"""The cluster document, by class: device kinds, link classes and shapes of groups, each measured once.

``measurement`` spells out every device, pair and group, as a profile measures them and files of version 1 held them;
``sameness`` finds what is alike in it.
"""

from .cluster import Cluster
from .groups import CollectiveCurve, GroupShape
from .kinds import (
    MAX_CLUSTER_DEVICES,
    MAX_DEVICES,
    Bytes,
    Copies,
    CpuShare,
    Device,
    DeviceKind,
    Disk,
    Host,
    OperatorCurve,
    Rate,
    Tabled,
    Threads,
)
from .links import SCOPES, LinkClass, LinkException, LinkRule, Scope
from .provenance import CurveNoise, Provenance
from .topology import Topology, TopologyEdge, TopologyNode

__all__ = [
    "MAX_CLUSTER_DEVICES",
    "MAX_DEVICES",
    "SCOPES",
    "Bytes",
    "Cluster",
    "CollectiveCurve",
    "Copies",
    "CpuShare",
    "CurveNoise",
    "Device",
    "DeviceKind",
    "Disk",
    "GroupShape",
    "Host",
    "LinkClass",
    "LinkException",
    "LinkRule",
    "OperatorCurve",
    "Provenance",
    "Rate",
    "Scope",
    "Tabled",
    "Threads",
    "Topology",
    "TopologyEdge",
    "TopologyNode",
]

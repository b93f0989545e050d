"""Classes of devices: GPUs of one kind on hosts that hold equally many of them. The search counts classes, not GPUs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...spec.cluster import Cluster
from ...spec.errors import MoeplanError

LARGEST_STAGE = 64  # GPUs of one stage: wider expert parallelism has no table


@dataclass(frozen=True)
class DeviceClass:
    """kind, system: names in the cluster and in the tables; memory in bytes of the smallest device, rates in bytes per
    second of one GPU, to another host."""

    kind: str
    system: str
    per_host: int
    hosts: int
    memory: int
    outside: float

    @property
    def gpus(self) -> int:
        return self.per_host * self.hosts

    @property
    def name(self) -> str:
        return f"{self.kind} ({self.hosts} x {self.per_host})"

    def sizes(self) -> tuple[int, ...]:
        """Sizes of stages, each a divisor of the next, so that any number of them packs without a gap as long as their
        GPUs do not exceed the class's: powers of two that divide a host's GPUs, then whole hosts."""
        found = [1]
        while self.per_host % (2 * found[-1]) == 0:
            found.append(2 * found[-1])
        size = self.per_host
        while size <= min(self.gpus, LARGEST_STAGE):
            if size > found[-1]:
                found.append(size)
            size *= 2
        return tuple(found)


def classes_of(cluster: Cluster) -> tuple[tuple[DeviceClass, ...], tuple[str, ...]]:
    """Classes of the devices whose kind is tabled, largest memory rate first; and what was left out, as notes.

    Raises MoeplanError where no kind is tabled.
    """
    kinds, hosts = cluster.kind_index, cluster.host_index
    held = np.zeros((len(cluster.kinds), len(cluster.hosts)), np.int64)
    np.add.at(held, (kinds, hosts), 1)
    memory = np.array([device.memory_bytes for device in cluster.devices])
    found, left_out = list[DeviceClass](), list[str]()
    for k, kind in enumerate(cluster.kinds):
        if kind.tabled is None:
            left_out.append(f"{int(held[k].sum())} devices of kind {kind.name!r} are left out: no tables name them")
            continue
        for per_host in np.unique(held[k][held[k] > 0]).tolist():
            where = np.flatnonzero(held[k] == per_host)
            mine = memory[(kinds == k) & np.isin(hosts, where)]
            outside = _outside(cluster, where, per_host)
            found.append(DeviceClass(kind.name, kind.tabled.system, per_host, len(where), int(mine.min()), outside))
    if not found:
        raise MoeplanError(
            "no kind of the cluster names a measured table (kinds[].tabled): make one with `moeplan cluster`"
        )
    order = {kind.name: -kind.stream_bandwidth for kind in cluster.kinds}
    return tuple(sorted(found, key=lambda c: (order[c.kind], c.kind, -c.per_host))), tuple(left_out)


def _outside(cluster: Cluster, hosts: np.ndarray, per_host: int) -> float:
    """Bytes per second that one GPU of these hosts has of its host's uplink; infinite on a single host."""
    rates = [rate for i in hosts.tolist() if (rate := cluster.hosts[i].uplink_out) is not None]
    return min(rates) / per_host if rates else float("inf")


def class_names(classes: Sequence[DeviceClass]) -> str:
    return ", ".join(f"{c.gpus} x {c.kind}" for c in classes)

"""Cluster: what each device and link really does, as measured; said once for all that are alike."""

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from ..curve import Curve
from ..document import Document, show
from ..errors import MoeplanError
from ..operators import Collective, Shape
from .groups import CollectiveCurve, Groups
from .kinds import MAX_CLUSTER_DEVICES, MAX_DEVICES, Device, DeviceKind, Host
from .links import LinkClass, LinkException, LinkRule, Links, Where
from .provenance import Provenance
from .topology import Topology


class Cluster(Document):
    """Devices and hosts; kinds, link classes and collectives with every curve that a prediction reads.

    ``kind_index``, ``host_index`` [devices] and ``link_class_index`` say which device and pair reads which.
    """

    kind: ClassVar[str] = "moeplan.cluster"
    version: ClassVar[int] = 2
    earlier: ClassVar[tuple[int, ...]] = (1,)

    kinds: tuple[DeviceKind, ...] = Field(min_length=1, max_length=MAX_CLUSTER_DEVICES)
    devices: tuple[Device, ...] = Field(min_length=1, max_length=MAX_CLUSTER_DEVICES)
    hosts: tuple[Host, ...] = Field(min_length=1, max_length=MAX_CLUSTER_DEVICES)
    link_classes: tuple[LinkClass, ...] = ()
    link_rules: tuple[LinkRule, ...] = ()
    link_exceptions: tuple[LinkException, ...] = ()
    collectives: tuple[CollectiveCurve, ...] = ()
    topology: Topology | None = Field(None, description="what lies between devices; none: made of the rest")
    lab: str | None = Field(None, description="name of the lab that it was measured in; none for real hosts")
    provenance: Provenance

    @model_validator(mode="after")
    def _consistent(self) -> "Cluster":
        kinds = _names("kind", self.kinds)
        hosts = _names("host", self.hosts)
        _names("link class", self.link_classes)
        for i, device in enumerate(self.devices):
            if device.host not in hosts:
                raise ValueError(f"devices[{i}].host {show(device.host)} is not among hosts {show(list(hosts))}")
            if device.kind not in kinds:
                raise ValueError(f"devices[{i}].kind {show(device.kind)} is not among kinds {show(list(kinds))}")
        families = dict.fromkeys(kind.called for kind in self.kinds)
        for i, rule in enumerate(self.link_rules):
            for end in ("source", "target"):
                if (named := getattr(rule, end)) is not None and named not in families:
                    raise ValueError(f"link_rules[{i}].{end} {show(named)} is not among kinds {show(list(families))}")
        if self.topology is not None:
            self.topology.check(len(self.devices), self.hosts)
        _ = self._lookup  # it checks the rest
        return self

    @classmethod
    def read_earlier(cls, version: int, body: str) -> "Cluster":
        from .sameness import Measurement, by_class

        return by_class(Measurement.model_validate_json(body, strict=True))

    @classmethod
    def hint(cls) -> str:
        return "; make one with `moeplan profile`"

    def check_size(self) -> None:
        """Raises MoeplanError where there are more devices than a plan or a placement names one by one."""
        if len(self.devices) > MAX_DEVICES:
            raise MoeplanError(
                f"the cluster has {len(self.devices):,} devices, at most {MAX_DEVICES:,} are planned one by one; "
                "a workload serve:... takes it whole"
            )

    @cached_property
    def _lookup(self) -> "_Lookup":
        return _Lookup(self)

    @property
    def kind_index(self) -> np.ndarray:
        """[devices] index in ``kinds``."""
        return self._lookup.kind_index

    @property
    def host_index(self) -> np.ndarray:
        """[devices] index in ``hosts``."""
        return self._lookup.where.levels[1]

    def kind_of(self, device: int) -> DeviceKind:
        return self.kinds[self.kind_index[device]]

    def host_of(self, device: int) -> int:
        """Index in ``hosts`` of a device's host."""
        return int(self.host_index[device])

    def operator(self, device: int, operator: str, shape: Shape, dtype: str, model: str, remedy: str = "") -> Curve:
        """The curve of an operator. The error names ``model``, or ends with another ``remedy`` than to measure it."""
        return self.kind_of(device).operator(operator, shape, dtype, model, remedy, device)

    def link_class_index(self, sources: np.ndarray | Sequence[int], targets: np.ndarray | Sequence[int]) -> np.ndarray:
        """Index in ``link_classes`` of the links of these devices, of the broadcast shape; -1 from one to itself."""
        return self._lookup.links.index(np.asarray(sources), np.asarray(targets))

    def scope_index(self, sources: np.ndarray | Sequence[int], targets: np.ndarray | Sequence[int]) -> np.ndarray:
        """Index in ``SCOPES`` of the smallest thing that holds both devices, of the broadcast shape."""
        return self._lookup.where.scope(np.asarray(sources), np.asarray(targets))

    def link_counts(self) -> np.ndarray:
        """[scope, link class] how many ordered pairs of devices; scopes as in ``SCOPES``."""
        return self._lookup.links.counts()

    def link(self, source: int, target: int) -> LinkClass:
        """The class of the link from one device to another."""
        if source == target:
            raise ValueError(f"device {source} has no link to itself")
        return self.link_classes[int(self.link_class_index(np.array(source), np.array(target)))]

    def collective(self, collective: Collective, group: tuple[int, ...]) -> CollectiveCurve:
        """The equal-traffic curve of a collective over exactly this group of devices, or else over its shape."""
        return self._lookup.groups.find(collective, group)


class _Lookup:
    """Arrays and dictionaries of a cluster; an object of its own, because arrays cannot be compared with ``==``."""

    def __init__(self, cluster: Cluster) -> None:
        at = {kind.name: i for i, kind in enumerate(cluster.kinds)}
        self.kind_index = np.array([at[device.kind] for device in cluster.devices])
        families = [cluster.kinds[i].called for i in self.kind_index.tolist()]
        self.where = Where.of(cluster.devices, cluster.hosts, families, cluster.link_rules)
        rules, exceptions = cluster.link_rules, cluster.link_exceptions
        self.links = Links(families, self.where, cluster.link_classes, rules, exceptions)
        self.groups = Groups(cluster.collectives, families, self.where)


def _names(what: str, entries: Sequence[DeviceKind] | Sequence[Host] | Sequence[LinkClass]) -> dict[str, None]:
    """The entries' names, in order; ValueError where one is there twice."""
    names = dict.fromkeys(entry.name for entry in entries)
    if len(names) != len(entries):
        raise ValueError(f"{what} names repeat: {show([entry.name for entry in entries])}")
    return names

"""A Cluster from its description and the data sheets of its GPUs: by classes, so that thousands are quick and small.

Links are straight lines: a latency and a rate, from the data sheet unless the description says. A GPU sends to another
GPU of its host at the rate inside hosts; to another host at the rate of one network card or its share of the host's
cards, whichever is more, and no faster than the other end takes it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product

from ..spec.cluster import Cluster, Device, DeviceKind, Host, LinkClass, LinkRule, Provenance, Tabled
from ..spec.cluster.kinds import MAX_CLUSTER_DEVICES
from ..spec.curve import Axis, Curve
from ..spec.described import Described, Hosts
from ..spec.errors import MoeplanError
from ..spec.quantities import parse_bytes, parse_rate
from ..spec.tabled import System

SIZES = (1024.0, 2.0**20, 2.0**30)  # bytes at which a straight line is written down
LATENCY = 1e-5  # seconds of the smallest message between GPUs: no data sheet gives it, the tables' authors assume this
HOST_SCOPES = ("switch", "host")


@dataclass(frozen=True)
class _Group:
    """One entry of the description with what it stands for. Rates in bytes per second."""

    hosts: Hosts
    system: System
    kind: str
    memory: int
    inside: float
    outside: float
    racks: float
    uplink: float


def cluster_of(described: Described, sheet: Callable[[str], System], source: str, command: str) -> Cluster:
    """The Cluster document; sheet: the data sheet of a GPU by its name; source: which tables, for the document.

    Raises MoeplanError where a name, a rate or a size is wrong, or there are too many devices.
    """
    if described.count > MAX_CLUSTER_DEVICES:
        raise MoeplanError(f"{described.count:,} GPUs: a cluster has at most {MAX_CLUSTER_DEVICES:,}")
    groups = [_group(entry, i, described, sheet(entry.gpu)) for i, entry in enumerate(described.devices)]
    devices, hosts = _devices(groups)
    classes, rules = _links(groups)
    return Cluster(
        kinds=tuple(_kind(group, source) for group in groups),
        devices=devices,
        hosts=hosts,
        link_classes=classes,
        link_rules=rules,
        provenance=Provenance(
            created=datetime.now().astimezone().isoformat(timespec="seconds"),
            command=command,
            versions={"tables": source},
            seconds=0.0,
            models=(),
            warnings=("tabled: nothing was measured on these machines; links are straight lines by data sheets",),
        ),
    )


def joined(tabled: Cluster, measured: Cluster, between: float) -> Cluster:
    """Both in one: the measured devices first, so that what names them by number stays true.

    between: bytes per second from a device of one to a device of the other.
    Raises MoeplanError where names clash or there are too many devices.
    """
    if len(tabled.devices) + len(measured.devices) > MAX_CLUSTER_DEVICES:
        raise MoeplanError(f"both have more than {MAX_CLUSTER_DEVICES:,} devices together")
    for what, ours, theirs in (
        ("kind", tabled.kinds, measured.kinds),
        ("host", tabled.hosts, measured.hosts),
        ("link class", tabled.link_classes, measured.link_classes),
    ):
        if same := {entry.name for entry in ours} & {entry.name for entry in theirs}:
            raise MoeplanError(f"both clusters have a {what} {min(same)!r}: rename it in the measured one")
    if measured.topology is not None:
        raise MoeplanError("the measured cluster has a topology by hand, which says nothing of new devices: remove it")
    link = _line("measured to tabled", max(_latencies(tabled), default=0.0), between)
    families = [sorted({kind.called for kind in cluster.kinds}) for cluster in (measured, tabled)]
    across = [
        LinkRule(scope="cluster", source=a, target=b, link=link.name)
        for ours, theirs in (families, families[::-1])
        for a, b in product(ours, theirs)
    ]
    if len(across) > 2 * 64 * 64:
        raise MoeplanError("more than 64 kinds of devices on one side: give alike kinds a family")
    warnings = (*measured.provenance.warnings, *tabled.provenance.warnings)
    provenance = measured.provenance.model_copy(
        update={"warnings": warnings, "versions": measured.provenance.versions | tabled.provenance.versions}
    )
    return Cluster(
        kinds=measured.kinds + tabled.kinds,
        devices=measured.devices + tabled.devices,
        hosts=measured.hosts + tabled.hosts,
        link_classes=(*measured.link_classes, *tabled.link_classes, link),
        link_rules=(*measured.link_rules, *tabled.link_rules, *across),
        link_exceptions=measured.link_exceptions,
        collectives=measured.collectives,
        lab=measured.lab,
        provenance=provenance,
    )


def _latencies(cluster: Cluster) -> list[float]:
    return [link.latency for link in cluster.link_classes]


def _group(entry: Hosts, number: int, described: Described, system: System) -> _Group:
    where = f"devices[{number}]"
    if entry.gpus % entry.switches:
        raise MoeplanError(f"{where}: {entry.gpus} GPUs do not divide between {entry.switches} switches")
    between = parse_rate(described.between, "between") if described.between else system.inter_node_bytes_per_second
    card = parse_rate(entry.nic_rate, f"{where}.nic_rate") if entry.nic_rate else between
    cards = entry.nics or entry.gpus
    outside = card * max(1.0, cards / entry.gpus)
    racks = parse_rate(described.between_racks, "between_racks") if described.between_racks else outside
    memory = parse_bytes(entry.memory) if entry.memory else int(system.memory_bytes)
    if memory > system.memory_bytes:
        raise MoeplanError(f"{where}.memory {entry.memory}: a {entry.gpu} has {system.memory_bytes / 2**30:.1f} GiB")
    kind = entry.gpu if number == _first(described.devices, entry.gpu) else f"{entry.gpu}-{number}"
    return _Group(
        entry, system, kind, memory, system.intra_node_bytes_per_second, outside, min(racks, outside), card * cards
    )


def _first(entries: Sequence[Hosts], gpu: str) -> int:
    return next(i for i, entry in enumerate(entries) if entry.gpu == gpu)


def _kind(group: _Group, source: str) -> DeviceKind:
    return DeviceKind(
        name=group.kind,
        type="cuda",
        product=group.system.name,
        stream_bandwidth=group.system.memory_bytes_per_second,
        tabled=Tabled(system=group.system.name, source=source),
    )


def _devices(groups: Sequence[_Group]) -> tuple[tuple[Device, ...], tuple[Host, ...]]:
    devices, hosts = list[Device](), list[Host]()
    for group in groups:
        entry, many = group.hosts, len(groups) > 1 or group.hosts.hosts > 1
        names = [f"switch-{s}" if entry.switches > 1 else None for s in range(entry.switches)]
        for number in range(entry.hosts):
            name = f"{group.kind}-host-{number}"
            rack = None if entry.hosts_per_rack is None else f"{group.kind}-rack-{number // entry.hosts_per_rack}"
            uplink = group.uplink if many else None
            hosts.append(Host(name=name, rack=rack, uplink_out=uplink, uplink_in=uplink))
            for switch in names:
                device = Device(kind=group.kind, host=name, switch=switch, memory_bytes=group.memory)
                devices += [device] * (entry.gpus // entry.switches)
    return tuple(devices), tuple(hosts)


def _links(groups: Sequence[_Group]) -> tuple[tuple[LinkClass, ...], tuple[LinkRule, ...]]:
    """Classes and rules; both ends are named in every rule, so that a measured cluster may stand beside them."""
    classes: dict[str, LinkClass] = {}
    rules = list[LinkRule]()

    def rule(scope: str, a: _Group, b: _Group, name: str, rate: float) -> None:
        classes.setdefault(name, _line(name, LATENCY, rate))
        rules.append(LinkRule.model_validate({"scope": scope, "source": a.kind, "target": b.kind, "link": name}))

    for a in groups:
        for scope in HOST_SCOPES:
            rule(scope, a, a, f"inside {a.kind} hosts", a.inside)
    for a, b in product(groups, groups):
        near, far = min(a.outside, b.outside), min(a.racks, b.racks)
        rule("rack", a, b, f"between hosts, {near / 1e9:g} GB/s", near)
        racks = a.hosts.hosts_per_rack is not None or b.hosts.hosts_per_rack is not None
        name, rate = (f"between racks, {far / 1e9:g} GB/s", far) if racks else (rules[-1].link, near)
        rule("cluster", a, b, name, rate)
    return tuple(classes.values()), tuple(rules)


def _line(name: str, latency: float, rate: float) -> LinkClass:
    seconds = tuple(latency + size / rate for size in SIZES)
    curve = Curve(axes=(Axis(name="bytes", values=SIZES, beyond="linear"),), median=seconds, spread=(0.0,) * len(SIZES))
    return LinkClass(name=name, latency=latency, curve=curve)

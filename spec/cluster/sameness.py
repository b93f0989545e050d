"""What is alike in a measurement, and the cluster that says it once.

Devices of one product whose curves are alike make a kind, pairs of one scope a link class, groups of one shape a curve
of that shape. A class's curve is the median of its members'. The most common class of a scope becomes its rule, that of
two kinds of devices a rule of theirs where it is another; what is left becomes exceptions. What counts as alike is the
caller's: equal to the last digit, as for old files, or within what was measured (``profiler.alike``).
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import chain, count
from typing import NamedTuple, TypeVar

import numpy as np

from ..curve import Curve
from .cluster import Cluster
from .groups import CollectiveCurve, Groups, GroupShape
from .kinds import Copies, Device, DeviceKind
from .links import SCOPES, LinkClass, LinkException, LinkRule, Where
from .measurement import MeasuredCollective, MeasuredDevice, MeasuredLink, Measurement
from .nvml import switch_of

T = TypeVar("T")


class Sample(NamedTuple):
    """What was measured of one device, pair or group."""

    numbers: tuple[float, ...]
    curves: tuple[Curve, ...]


Alike = Callable[[Sequence[Sample]], list[int]]
"""A label for each sample; those with the same label count as the same."""


def identical(samples: Sequence[Sample]) -> list[int]:
    """Equal to the last digit."""
    labels: dict[Sample, int] = {}
    return [labels.setdefault(sample, len(labels)) for sample in samples]


def by_class(measured: Measurement, alike: Alike = identical) -> Cluster:
    """The cluster of a measurement."""
    kinds, devices = _kinds(measured.devices, alike)
    families = [device.kind for device in devices]
    where = Where.of(devices, measured.hosts, families)
    classes, rules, exceptions = _links(measured.links, devices, where, alike)
    return Cluster(
        kinds=kinds,
        devices=devices,
        hosts=measured.hosts,
        link_classes=classes,
        link_rules=rules,
        link_exceptions=exceptions,
        collectives=_collectives(measured.collectives, families, where, alike),
        lab=measured.lab,
        provenance=measured.provenance,
    )


def together(samples: Sequence[Sample]) -> Sample:
    """The median of samples whose curves have the same axes; the first where they are equal."""
    first = samples[0]
    if len(samples) == 1 or all(sample == first for sample in samples):
        return first
    numbers = np.median([sample.numbers for sample in samples], axis=0) if first.numbers else np.empty(0)
    curves = tuple(
        curve.model_copy(
            update={
                name: tuple(np.median([getattr(s.curves[i], name) for s in samples], axis=0).tolist())
                for name in ("median", "spread")
            }
        )
        for i, curve in enumerate(first.curves)
    )
    return Sample(tuple(numbers.tolist()), curves)


def _grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> dict[Hashable, list[T]]:
    found: dict[Hashable, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def numbered(name: str, taken: set[str]) -> str:
    """The name, with a number where it is taken; taken from then on."""
    free = next(f for f in chain([name], (f"{name} ({i})" for i in count(2))) if f not in taken)
    taken.add(free)
    return free


def _kinds(measured: Sequence[MeasuredDevice], alike: Alike) -> tuple[tuple[DeviceKind, ...], tuple[Device, ...]]:
    """Only devices with the same name, threads, share and grids of curves are compared."""
    curves = [{entry.key: entry for entry in reversed(device.operators)} for device in measured]

    def fields(i: int) -> tuple:
        device = measured[i]
        grids = frozenset((key, entry.curve.axes) for key, entry in curves[i].items())
        folder = device.disk and device.disk.folder
        return device.kind, device.name, device.threads, device.cpu_share, grids, device.copies is None, folder

    def sample(i: int, order: Sequence[tuple]) -> Sample:
        copies, disk = measured[i].copies, measured[i].disk
        moved = ((disk.read,) if disk else ()) + ((copies.to_device, copies.to_host) if copies else ())
        return Sample((measured[i].stream_bandwidth,), tuple(curves[i][key].curve for key in order) + moved)

    found: dict[int, tuple[list[int], DeviceKind]] = {}
    for equal in _grouped(range(len(measured)), fields).values():
        order = list(dict.fromkeys(entry.key for entry in measured[equal[0]].operators))
        samples = {i: sample(i, order) for i in equal}
        labels = dict(zip(equal, alike(list(samples.values())), strict=True))
        for members in _grouped(equal, labels.__getitem__).values():
            like = measured[members[0]].model_copy(update={"operators": tuple(curves[equal[0]][key] for key in order)})
            found[members[0]] = members, _kind(like, together([samples[i] for i in members]))
    kinds, kind_of, names = [], dict[int, str](), set[str]()
    for first in sorted(found):
        members, kind = found[first]
        kinds.append(kind.model_copy(update={"name": numbered(kind.name, names)}))
        kind_of |= dict.fromkeys(members, kinds[-1].name)
    devices = (
        Device(
            kind=kind_of[i],
            host=device.host,
            switch=switch_of(device.details),
            memory_bytes=device.memory_bytes,
            details=device.details,
        )
        for i, device in enumerate(measured)
    )
    return tuple(kinds), tuple(devices)


def _kind(like: MeasuredDevice, sample: Sample) -> DeviceKind:
    """The kind of a device with these numbers and curves: of its operators in turn, its disk, its copies."""
    disk = like.disk and like.disk.model_copy(update={"read": sample.curves[len(like.operators)]})
    return DeviceKind(
        name=like.name or like.kind,
        type=like.kind,
        product=like.name,
        threads=like.threads,
        cpu_share=like.cpu_share,
        stream_bandwidth=sample.numbers[0],
        operators=tuple(
            entry.model_copy(update={"curve": curve})
            for entry, curve in zip(like.operators, sample.curves, strict=False)
        ),
        copies=like.copies and Copies(to_device=sample.curves[-2], to_host=sample.curves[-1]),
        disk=disk,
    )


def _links(
    measured: Sequence[MeasuredLink], devices: Sequence[Device], where: Where, alike: Alike
) -> tuple[tuple[LinkClass, ...], tuple[LinkRule, ...], tuple[LinkException, ...]]:
    classes, rules, exceptions, names = [], list[LinkRule](), list[LinkException](), set[str]()
    scopes = where.scope(
        np.array([link.source for link in measured], int), np.array([link.target for link in measured], int)
    )
    for scope in sorted(set(scopes.tolist())):
        links = [link for link, of in zip(measured, scopes, strict=True) if of == scope]
        samples = [Sample((link.latency,), (link.curve,)) for link in links]
        labels = alike(samples)
        name_of = {}
        for members in sorted(_grouped(range(len(links)), labels.__getitem__).values(), key=len, reverse=True):
            found = together([samples[i] for i in members])
            name = name_of[labels[members[0]]] = numbered(SCOPES[scope], names)
            classes.append(LinkClass(name=name, latency=found.numbers[0], curve=found.curves[0]))
        pairs = [(link, name_of[label]) for link, label in zip(links, labels, strict=True)]
        more, others = _rules(scope, pairs, devices)
        rules += more
        exceptions += others
    return tuple(classes), tuple(rules), tuple(exceptions)


def _rules(
    scope: int, pairs: Sequence[tuple[MeasuredLink, str]], devices: Sequence[Device]
) -> tuple[list[LinkRule], list[LinkException]]:
    """The rules and exceptions of one scope. pairs: links with the names of their classes."""
    most = Counter(name for _, name in pairs).most_common(1)[0][0]
    rules, exceptions = [LinkRule(scope=SCOPES[scope], link=most)], []
    by_kinds = _grouped(pairs, lambda pair: (devices[pair[0].source].kind, devices[pair[0].target].kind))
    for members in by_kinds.values():
        link, name = members[0]
        name, times = Counter(name for _, name in members).most_common(1)[0]
        if name != most and times > 1:
            source, target = devices[link.source].kind, devices[link.target].kind
            rules.append(LinkRule(scope=SCOPES[scope], source=source, target=target, link=name))
        else:
            name = most
        exceptions += [
            LinkException(source=link.source, target=link.target, link=n) for link, n in members if n != name
        ]
    return rules, exceptions


def _collectives(
    measured: Sequence[MeasuredCollective], families: Sequence[str], where: Where, alike: Alike
) -> tuple[CollectiveCurve, ...]:
    """A curve of a shape where at least two of its groups are alike; what one group alone does stays its own."""
    groups = Groups((), families, where)
    first = {(entry.collective, entry.traffic, entry.group): entry for entry in reversed(measured)}
    shapes = {group: groups.shape(group) for _, _, group in first}
    found = []
    everyone = _grouped(
        reversed(first.values()),
        lambda entry: (entry.collective, entry.traffic, *shapes[entry.group]._replace(kinds=())),
    )
    for entries in everyone.values():
        every_kind = {kind for entry in entries for kind in shapes[entry.group].kinds} == set(families)
        if len(entries) > 1 and every_kind and len(set(alike([_sample(entry) for entry in entries]))) == 1:
            found.append(_of_shape(entries, shapes[entries[0].group], limited=False))
            continue
        for members in _grouped(entries, lambda entry: shapes[entry.group].kinds).values():
            labels = alike([_sample(entry) for entry in members])
            most, times = Counter(labels).most_common(1)[0]
            if times > 1:
                same = [entry for entry, label in zip(members, labels, strict=True) if label == most]
                found.append(_of_shape(same, shapes[same[0].group], limited=True))
            found += [
                CollectiveCurve(**dict(entry))
                for entry, label in zip(members, labels, strict=True)
                if times == 1 or label != most
            ]
    return tuple(found)


def _sample(entry: MeasuredCollective) -> Sample:
    return Sample((), (entry.curve, entry.busy, *([entry.last] if entry.last else [])))


def _of_shape(entries: Sequence[MeasuredCollective], shape: GroupShape, limited: bool) -> CollectiveCurve:
    """One curve for all groups of the shape; limited: of its kinds only."""
    curve, busy, *last = together([_sample(entry) for entry in entries]).curves
    return CollectiveCurve(
        collective=entries[0].collective,
        traffic=entries[0].traffic,
        members=shape.members,
        kinds=shape.kinds if limited else None,
        scope=shape.scope,
        curve=curve,
        busy=busy,
        last=last[0] if last else None,
    )

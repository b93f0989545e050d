"""A cluster spelled out: what its ranks would have measured, and the file of version 1 that held it."""

import json
from collections.abc import Sequence

from moeplan.spec import Cluster, Model
from moeplan.spec.cluster.measurement import MeasuredCollective, MeasuredDevice, MeasuredLink, Measurement
from moeplan.spec.errors import MissingCurveError
from moeplan.spec.operators import COLLECTIVES


def usual_groups(cluster: Cluster) -> list[tuple[int, ...]]:
    """What a profile measures and a search asks for: all devices, and consecutive ones of each tensor degree."""
    count = len(cluster.devices)
    degrees = [t for t in range(2, count) if count % t == 0]
    return [tuple(range(count))] + [tuple(range(i, i + t)) for t in degrees for i in range(0, count, t)]


def spelled_out(cluster: Cluster, groups: Sequence[tuple[int, ...]] | None = None) -> Measurement:
    """Every device, pair and group (where the cluster has a curve) with curves of its own."""
    count = len(cluster.devices)
    devices = []
    for i, device in enumerate(cluster.devices):
        kind = cluster.kind_of(i)
        devices.append(
            MeasuredDevice(
                host=device.host,
                kind=kind.type,
                name=kind.product,
                memory_bytes=device.memory_bytes,
                threads=kind.threads,
                cpu_share=kind.cpu_share,
                stream_bandwidth=kind.stream_bandwidth,
                operators=kind.operators,
                copies=kind.copies,
                disk=kind.disk,
                details=device.details,
            )
        )
    collectives = []
    for group in usual_groups(cluster) if groups is None else groups:
        for name in COLLECTIVES if len(group) > 1 else ():
            try:
                found = cluster.collective(name, group)
            except MissingCurveError:
                continue
            curves = {"curve": found.curve, "busy": found.busy, "last": found.last}
            collectives.append(MeasuredCollective(collective=name, group=group, **curves))
    links = [
        MeasuredLink(source=i, target=j, latency=cluster.link(i, j).latency, curve=cluster.link(i, j).curve)
        for i in range(count)
        for j in range(count)
        if i != j
    ]
    return Measurement(
        devices=tuple(devices),
        hosts=cluster.hosts,
        links=tuple(links),
        collectives=tuple(collectives),
        lab=cluster.lab,
        provenance=cluster.provenance,
    )


def first_version(document: Measurement | Model) -> str:
    """The text of the document of version 1; what is as by default is left out: early readers refuse later fields."""
    kind = Cluster.kind if isinstance(document, Measurement) else document.kind
    body = document.model_dump(mode="json", exclude_defaults=True)
    return json.dumps({"kind": kind, "version": 1, **body}, indent=1) + "\n"

"""The table of a cluster that was made by name."""

from collections import Counter

from rich import box
from rich.table import Table

from ...spec.cluster import Cluster
from ...spec.cluster.links import SCOPES


def made_table(cluster: Cluster) -> Table:
    """Kinds with their devices, hosts, memory and rates."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("kind", "devices", "hosts", "memory GiB", "memory GB/s", "inside GB/s", "between GB/s", "times"):
        table.add_column(name, justify="left" if name in ("kind", "times") else "right")
    counts = Counter(device.kind for device in cluster.devices)
    for kind in cluster.kinds:
        mine = [device for device in cluster.devices if device.kind == kind.name]
        hosts = len({device.host for device in mine})
        table.add_row(
            kind.name,
            str(counts[kind.name]),
            str(hosts),
            f"{min(device.memory_bytes for device in mine) / 2**30:.1f}",
            f"{kind.stream_bandwidth / 1e9:,.0f}",
            _rate(cluster, kind.called, "host"),
            _rate(cluster, kind.called, "cluster"),
            f"tables of {kind.tabled.system}" if kind.tabled else "measured",
        )
    return table


def _rate(cluster: Cluster, family: str, scope: str) -> str:
    """Of links between two devices of one family, by the rule that names most of them."""
    assert scope in SCOPES
    classes = {link.name: link for link in cluster.link_classes}
    fitting = [
        rule
        for rule in cluster.link_rules
        if rule.scope == scope and rule.source in (None, family) and rule.target in (None, family)
    ]
    if not fitting:
        return "-"
    rule = max(fitting, key=lambda r: (r.source is not None) + (r.target is not None))
    return f"{classes[rule.link].bandwidth / 1e9:,.0f}"

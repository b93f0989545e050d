"""A new profile together with what an old one of the same devices knows besides."""

from ..spec.cluster import Cluster, Device, DeviceKind
from ..spec.cluster.sameness import numbered
from ..spec.errors import MoeplanError


def merge(old: Cluster, new: Cluster) -> Cluster:
    """The new profile, with the operator curves of the old one that it did not measure again.

    Devices of one new kind that were of several old ones become several kinds, alike in links and collectives. Raises
    MoeplanError when the profiles are not of the same devices.
    """
    if old.lab != new.lab or len(old.devices) != len(new.devices):
        raise MoeplanError(
            f"cannot add to a profile of {_place(old)}: this one is of {_place(new)}; write it to another file"
        )
    _check_devices(old, new)
    kinds: dict[tuple[str, str], DeviceKind] = {}
    devices = list[Device]()
    taken = {kind.name for kind in new.kinds}
    for i, device in enumerate(new.devices):
        before, after = old.kind_of(i), new.kind_of(i)
        pair = before.name, after.name
        if pair not in kinds:
            split = any(name == after.name for _, name in kinds)
            name = numbered(after.name, taken) if split else after.name
            measured = {entry.key for entry in after.operators}
            kept = tuple(entry for entry in before.operators if entry.key not in measured)
            update = {
                "name": name,
                "family": after.called if split else after.family,
                "disk": after.disk or before.disk,
            }
            kinds[pair] = after.model_copy(update=update | {"operators": kept + after.operators})
        devices.append(device.model_copy(update={"kind": kinds[pair].name}))
    models = tuple(dict.fromkeys(old.provenance.models + new.provenance.models))
    provenance = new.provenance.model_copy(update={"models": models})
    return new.model_copy(update={"kinds": tuple(kinds.values()), "devices": tuple(devices), "provenance": provenance})


def _check_devices(old: Cluster, new: Cluster) -> None:
    for i in range(len(new.devices)):
        before, after = old.kind_of(i), new.kind_of(i)
        fields = {"host": (old.devices[i].host, new.devices[i].host)}
        fields |= {
            name: (getattr(before, name), getattr(after, name)) for name in ("type", "product", "threads", "cpu_share")
        }
        for field, (was, now) in fields.items():
            if was != now:
                raise MoeplanError(
                    f"cannot add to a profile of other devices: device {i} had {field} {was!r}, now {now!r}; "
                    "write it to another file"
                )


def _place(cluster: Cluster) -> str:
    where = f"lab {cluster.lab}" if cluster.lab else "real hosts"
    return f"{len(cluster.devices)} devices ({where})"

"""A measurement spelled out: every device, ordered pair and group with curves of its own.

It is what the ranks of a profile return, and what version 1 of the cluster document held.
"""

from typing import Literal

from pydantic import Field, model_validator

from ..curve import MAX_SECONDS, Curve
from ..document import Part, show
from ..operators import Collective
from .kinds import MAX_DEVICES, Bytes, Copies, CpuShare, Disk, Host, OperatorCurve, Rate, Threads, needs_bytes
from .provenance import Provenance


class MeasuredDevice(Part):
    """One device and its curves; the fields are those of ``Device`` and ``DeviceKind``."""

    host: str
    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: Bytes
    threads: Threads = 1
    cpu_share: CpuShare = 1.0
    stream_bandwidth: Rate
    operators: tuple[OperatorCurve, ...] = ()
    copies: Copies | None = None
    disk: Disk | None = None
    details: dict[str, str] = Field({})


class MeasuredLink(Part):
    """An ordered pair of devices: one-way seconds over bytes, measured alone."""

    source: int = Field(ge=0)
    target: int = Field(ge=0)
    latency: float = Field(ge=0, le=MAX_SECONDS)
    curve: Curve

    @model_validator(mode="after")
    def _over_bytes(self) -> "MeasuredLink":
        needs_bytes("link", self.curve)
        return self


class MeasuredCollective(Part):
    """A collective over one group of devices; see ``CollectiveCurve``."""

    collective: Collective
    group: tuple[int, ...]
    traffic: Literal["equal", "skewed"] = "equal"
    curve: Curve
    busy: Curve
    last: Curve | None = None

    @model_validator(mode="after")
    def _over_bytes(self) -> "MeasuredCollective":
        needs_bytes(self.collective, self.curve, self.busy, *([self.last] if self.last else []))
        return self


class Measurement(Part):
    """Devices, hosts, the links of all ordered pairs, and collectives over groups."""

    devices: tuple[MeasuredDevice, ...] = Field(min_length=1, max_length=MAX_DEVICES)
    hosts: tuple[Host, ...] = Field(min_length=1, max_length=MAX_DEVICES)
    links: tuple[MeasuredLink, ...] = ()
    collectives: tuple[MeasuredCollective, ...] = ()
    lab: str | None = None
    provenance: Provenance

    @model_validator(mode="after")
    def _consistent(self) -> "Measurement":
        names = [host.name for host in self.hosts]
        known = set(names)
        if len(known) != len(names):
            raise ValueError(f"host names repeat: {show(names)}")
        for i, device in enumerate(self.devices):
            if device.host not in known:
                raise ValueError(f"devices[{i}].host {show(device.host)} is not among hosts {show(names)}")
        count = len(self.devices)
        pairs = {(link.source, link.target) for link in self.links}
        inside = all(i != j and i < count and j < count for i, j in pairs)
        if not inside or not len(pairs) == len(self.links) == count * (count - 1):
            raise ValueError(f"links must hold every ordered pair of {count} devices once")
        for i, entry in enumerate(self.collectives):
            inside = all(0 <= device < count for device in entry.group)
            if len(entry.group) < 2 or len(set(entry.group)) != len(entry.group) or not inside:
                raise ValueError(f"collectives[{i}].group must name two or more of the {count} devices")
        return self

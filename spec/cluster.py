"""Cluster: what each device and link really does, as measured."""

import shlex
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from .curve import MAX_SECONDS, Curve
from .document import Document, Part, show
from .errors import MissingCurveError
from .load import Load
from .model import DType
from .operators import OPERATORS, Collective, Shape

MAX_DEVICES = 4096
Threads = Annotated[int, Field(ge=1, le=4096)]
CpuShare = Annotated[float, Field(ge=1e-6, le=4096)]
Bytes = Annotated[int, Field(ge=1, le=2**60)]
Rate = Annotated[float, Field(ge=1.0, le=1e18)]
"""Bytes per second."""


def _needs_bytes(name: str, *curves: Curve) -> None:
    for curve in curves:
        axes = tuple(axis.name for axis in curve.axes)
        if axes != ("bytes",):
            raise ValueError(f"{name} needs axes ('bytes',), got {axes}")


class OperatorCurve(Part):
    """Seconds of one operator on one device; see ``spec.operators`` for its axes and shape."""

    operator: str
    shape: Shape
    dtype: DType
    curve: Curve

    @model_validator(mode="after")
    def _known(self) -> "OperatorCurve":
        if self.operator not in OPERATORS:
            raise ValueError(f"unknown operator {self.operator!r}")
        axes = tuple(axis.name for axis in self.curve.axes)
        if axes != OPERATORS[self.operator].axes:
            raise ValueError(f"{self.operator} needs axes {OPERATORS[self.operator].axes}, got {axes}")
        return self


class Copies(Part):
    """Copies between host memory and the device: seconds over bytes."""

    to_device: Curve
    to_host: Curve

    @model_validator(mode="after")
    def _over_bytes(self) -> "Copies":
        _needs_bytes("copies", self.to_device, self.to_host)
        return self


class Device(Part):
    """One device, driven by the rank of the same number."""

    host: str
    kind: Literal["cpu", "cuda"]
    name: str
    memory_bytes: Bytes = Field(description="available when it was measured")
    threads: Threads = Field(1, description="cpu: threads that the rank uses")
    cpu_share: CpuShare = Field(
        1.0, description="cpu: cores' worth of time that the rank may use (less than its threads in the lab)"
    )
    stream_bandwidth: Rate = Field(description="bytes per second read by a large sum over memory")
    operators: tuple[OperatorCurve, ...] = ()
    copies: Copies | None = None
    details: dict[str, str] = Field({}, description="NVML: clocks, PCIe/NVLink, NUMA node, driver")


class Host(Part):
    """One host; what its uplink carries when all its devices send (or receive) at once."""

    name: str
    uplink_out: Rate | None = Field(None, description="bytes per second; none with a single host")
    uplink_in: Rate | None = Field(None, description="bytes per second")


class Link(Part):
    """An ordered pair of devices: one-way seconds over bytes, measured alone."""

    source: int = Field(ge=0)
    target: int = Field(ge=0)
    latency: float = Field(ge=0, le=MAX_SECONDS, description="seconds, one way, smallest message")
    curve: Curve = Field(description="axis: bytes")

    @model_validator(mode="after")
    def _over_bytes(self) -> "Link":
        _needs_bytes("link", self.curve)
        return self


class CollectiveCurve(Part):
    """Seconds of a collective of the runtime over one group of devices.

    The axis is ``bytes``: all_to_all, what each device sends each other device; all_gather, what each device
    contributes; reduce_scatter, what each device receives; all_reduce, the whole buffer.
    ``busy`` is the processor time that a device spends on it (the communication library's threads), which an
    overlapped computation loses.
    """

    collective: Collective
    group: tuple[int, ...]
    traffic: Literal["equal", "skewed"] = "equal"
    curve: Curve
    busy: Curve

    @model_validator(mode="after")
    def _over_bytes(self) -> "CollectiveCurve":
        _needs_bytes(self.collective, self.curve, self.busy)
        return self


class CurveNoise(Part):
    """How far repeated measurements of one operator, collective, or the links lay apart."""

    curve: str = Field(description="operator and dtype, collective, or links")
    points: PositiveInt = Field(description="measured, on all devices")
    noisy: int = Field(ge=0, description="points whose spread is above 0.5")
    typical: float = Field(ge=0, description="median of the points' spreads")
    worst: float = Field(ge=0, description="largest of the points' spreads")
    disturbed: int = Field(0, ge=0, description="points that other programs never left alone for long enough")


class Provenance(Part):
    """How, when and with what it was measured."""

    created: str
    command: str
    versions: dict[str, str]
    seconds: float
    models: tuple[str, ...] = Field(description="names of the models whose shapes were measured")
    warnings: tuple[str, ...] = ()
    load: Load | None = Field(None, description="what others took of the processors while it was measured")
    waited: float = Field(0.0, ge=0, description="seconds spent waiting for other programs to be done")
    noise: tuple[CurveNoise, ...] = ()
    spread_limit: float | None = Field(None, description="typical spread beyond which a curve was not to be used")
    disturbed_limit: float | None = Field(None, description="part of its points disturbed beyond which it was not")
    noise_accepted: bool = Field(False, description="whether curves beyond the limit were kept all the same")


class Cluster(Document):
    """Devices, hosts and links, with every curve that a prediction reads."""

    kind: ClassVar[str] = "moeplan.cluster"

    devices: tuple[Device, ...] = Field(min_length=1, max_length=MAX_DEVICES)
    hosts: tuple[Host, ...] = Field(min_length=1, max_length=MAX_DEVICES)
    links: tuple[Link, ...] = ()
    collectives: tuple[CollectiveCurve, ...] = ()
    lab: str | None = Field(None, description="name of the lab that it was measured in; none for real hosts")
    provenance: Provenance

    @model_validator(mode="after")
    def _consistent(self) -> "Cluster":
        names = [host.name for host in self.hosts]
        known = set(names)
        if len(known) != len(names):
            raise ValueError(f"host names repeat: {show(names)}")
        for i, device in enumerate(self.devices):
            if device.host not in known:
                raise ValueError(f"devices[{i}].host {device.host!r} is not among hosts {show(names)}")
        count = len(self.devices)
        pairs = {(link.source, link.target) for link in self.links}
        inside = all(i != j and i < count and j < count for i, j in pairs)
        if not inside or not len(pairs) == len(self.links) == count * (count - 1):
            raise ValueError(f"links must hold every ordered pair of {count} devices once")
        for i, entry in enumerate(self.collectives):
            inside = all(0 <= device < len(self.devices) for device in entry.group)
            if len(entry.group) < 2 or len(set(entry.group)) != len(entry.group) or not inside:
                raise ValueError(f"collectives[{i}].group must name two or more of the {len(self.devices)} devices")
        return self

    @classmethod
    def hint(cls) -> str:
        return "; make one with `moeplan profile`"

    def operator(self, device: int, operator: str, shape: Shape, dtype: str, model: str, remedy: str = "") -> Curve:
        """The curve of an operator. The error names ``model``, or ends with another ``remedy`` than to measure it."""
        for entry in self.devices[device].operators:
            if entry.operator == operator and entry.dtype == dtype and entry.shape == shape:
                return entry.curve
        wanted = ", ".join(f"{name} {value}" for name, value in shape.items())
        raise MissingCurveError(
            f"the cluster has no {operator} curve ({wanted}, {dtype}) for device {device}: "
            + (remedy or f"measure it with `moeplan profile --model {shlex.quote(model)} --dtype {dtype}`")
        )

    def collective(self, collective: Collective, group: tuple[int, ...]) -> CollectiveCurve:
        """The equal-traffic curve of a collective over exactly this group of devices."""
        for entry in self.collectives:
            if entry.collective == collective and entry.group == group and entry.traffic == "equal":
                return entry
        raise MissingCurveError(
            f"the cluster has no {collective} curve for devices {list(group)}: measure it with `moeplan profile`"
        )

    def link(self, source: int, target: int) -> Link:
        return next(link for link in self.links if (link.source, link.target) == (source, target))

    def host_of(self, device: int) -> int:
        """Index in ``hosts`` of a device's host."""
        return [host.name for host in self.hosts].index(self.devices[device].host)

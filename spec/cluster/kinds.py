"""Device kinds: what devices that are alike really do; the devices and hosts that refer to them."""

import shlex
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..curve import Curve
from ..document import Part
from ..errors import MissingCurveError
from ..model import DType
from ..operators import OPERATORS, Shape

MAX_DEVICES = 4096
"""Of a plan or placement."""
MAX_CLUSTER_DEVICES = 16384
"""Of a cluster: what is served by whole classes of devices may be larger than what is placed device by device."""
TABLED_REMEDY = (
    "it is a GPU of measured tables, which are for `moeplan solve --workload serve:isl=1024,osl=512` and "
    "`moeplan advise --device`"
)
Threads = Annotated[int, Field(ge=1, le=4096)]
CpuShare = Annotated[float, Field(ge=1e-6, le=4096)]
Bytes = Annotated[int, Field(ge=1, le=2**60)]
Rate = Annotated[float, Field(ge=1.0, le=1e18)]
"""Bytes per second."""


def needs_bytes(name: str, *curves: Curve) -> None:
    """Raises ValueError where a curve is not one over bytes."""
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

    @property
    def key(self) -> tuple:
        """What the curve is of; the order of the shape's fields does not count."""
        return curve_key(self.operator, self.shape, self.dtype)


def curve_key(operator: str, shape: Mapping[str, int | str], dtype: str) -> tuple:
    return operator, dtype, frozenset(shape.items())


class Copies(Part):
    """Copies between host memory and the device: seconds over bytes."""

    to_device: Curve
    to_host: Curve

    @model_validator(mode="after")
    def _over_bytes(self) -> "Copies":
        needs_bytes("copies", self.to_device, self.to_host)
        return self


class Disk(Part):
    """Where experts that memory does not hold may rest: seconds over bytes of a direct read from a file in ``folder``
    while all devices read."""

    folder: str
    read: Curve

    @model_validator(mode="after")
    def _over_bytes(self) -> "Disk":
        needs_bytes("disk", self.read)
        return self


class Tabled(Part):
    """Where the times of a kind come from that nobody measured here: a measured table of its GPU type."""

    system: str = Field(min_length=1, max_length=100, description="name of the GPU type in the tables")
    source: str = Field(max_length=300, description="which tables, with their version")


class DeviceKind(Part):
    """Devices that do the same: one product, one set of curves."""

    name: str = Field(description="what devices call it")
    family: str | None = Field(
        None, description="what link rules and collectives call it and all kinds that are alike there; none: its name"
    )
    type: Literal["cpu", "cuda"]
    product: str = Field("", description="what the system calls it")
    threads: Threads = Field(1, description="cpu: threads that the rank uses")
    cpu_share: CpuShare = Field(
        1.0, description="cpu: cores' worth of time that the rank may use (less than its threads in the lab)"
    )
    stream_bandwidth: Rate = Field(description="bytes per second read by a large sum over memory")
    operators: tuple[OperatorCurve, ...] = ()
    copies: Copies | None = None
    disk: Disk | None = Field(None, description="of its host, where one was measured (--offload)")
    tabled: Tabled | None = Field(None, description="measured tables of this GPU type; serving plans read them")

    @model_validator(mode="after")
    def _once(self) -> "DeviceKind":
        seen = set()
        for i, entry in enumerate(self.operators):
            if entry.key in seen:
                raise ValueError(f"operators[{i}]: {entry.operator} of this shape and dtype is there twice")
            seen.add(entry.key)
        return self

    @property
    def slow_tier(self) -> Curve | None:
        """Seconds over bytes of an expert on its way into memory: from the host's to a GPU, else from a disk."""
        if self.type == "cuda":
            return self.copies.to_device if self.copies else None
        return self.disk.read if self.disk else None

    @property
    def called(self) -> str:
        """What link rules and collectives call it."""
        return self.family or self.name

    @cached_property
    def _curves(self) -> dict[tuple, Curve]:
        return {entry.key: entry.curve for entry in self.operators}

    def find(self, operator: str, shape: Shape, dtype: str) -> Curve | None:
        """The curve of an operator, where it was measured."""
        return self._curves.get(curve_key(operator, shape, dtype))

    def operator(
        self, operator: str, shape: Shape, dtype: str, model: str, remedy: str = "", device: int | None = None
    ) -> Curve:
        """The curve of an operator.

        Without one MissingCurveError names ``device`` (else the kind) and what to measure for ``model``, or another
        ``remedy``; of a GPU that only tables know, what these are for.
        """
        found = self.find(operator, shape, dtype)
        if found is not None:
            return found
        wanted = ", ".join(f"{name} {value}" for name, value in shape.items())
        where = f"devices of kind {self.name}" if device is None else f"device {device}"
        if self.tabled is not None:
            remedy = TABLED_REMEDY
        raise MissingCurveError(
            f"the cluster has no {operator} curve ({wanted}, {dtype}) for {where}: "
            + (remedy or f"measure it with `moeplan profile --model {shlex.quote(model)} --dtype {dtype}`")
        )


class Device(Part):
    """One device, driven by the rank of the same number."""

    kind: str = Field(description="name of its kind")
    host: str = Field(description="name of its host")
    switch: str | None = Field(None, description="switch of the host that it hangs on, where the host has several")
    memory_bytes: Bytes = Field(description="available when it was measured")
    details: dict[str, str] = Field({}, description="NVML: clocks, PCIe/NVLink, NUMA node, driver")


class Host(Part):
    """One host; what its uplink carries when all its devices send (or receive) at once."""

    name: str
    rack: str | None = Field(None, description="rack, pod or leaf switch, where links inside it differ from others")
    uplink_out: Rate | None = Field(None, description="bytes per second; none with a single host")
    uplink_in: Rate | None = Field(None, description="bytes per second")

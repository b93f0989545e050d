"""The lab: an emulated cluster on one Linux machine, with hosts of unequal speed and a slow network between them.

Processor time is shared by ``lab_cpu``, the network is built by ``lab_network``; both say how, and what was measured.
"""

import contextlib
import itertools
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

from pydantic import Field, PositiveFloat, ValidationError, model_validator

from ...spec.cluster import Threads
from ...spec.document import Part
from ...spec.document import describe as describe_rule
from ...spec.errors import DocumentError, MoeplanError
from ...spec.files import read_text
from ...spec.texts import parse_yaml
from . import lab_cpu, lab_network
from .lab_watchdog import clean_stale, guarded
from .rank import Event, Seated
from .supervise import Seat, Supervisor

MAX_BYTES = 1 << 20
MAX_RANKS = 512
"""Of a lab in all: more than the cores of any machine, which each rank has one of at least."""

Gbit = Annotated[float, Field(ge=1e-6, le=1e6)]


class LabHost(Part):
    """An emulated host: ``ranks`` devices, each with ``cpu_share`` cores' worth of time over ``threads`` cores."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,23}$")
    ranks: int = Field(ge=1, le=MAX_RANKS)
    cpu_share: PositiveFloat
    threads: Threads = 1
    uplink_gbit: Gbit | None = Field(None, description="Gbit/s, each way; default: the lab's")

    @model_validator(mode="after")
    def _share(self) -> "LabHost":
        if self.cpu_share > self.threads * lab_cpu.FULL:
            raise ValueError(
                f"cpu_share {self.cpu_share:g} is more than {self.threads} thread(s) x {lab_cpu.FULL:g} can use"
            )
        return self


class LabSpec(Part):
    """A lab file."""

    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,63}$")
    hosts: tuple[LabHost, ...] = Field(min_length=1, max_length=64)
    uplink_gbit: Gbit | None = None

    @model_validator(mode="after")
    def _complete(self) -> "LabSpec":
        names = [host.name for host in self.hosts]
        if len(set(names)) != len(names):
            raise ValueError(f"host names repeat: {names}")
        slow = [host.name for host in self.hosts if not (host.uplink_gbit or self.uplink_gbit)]
        if len(names) > 1 and slow:
            raise ValueError(f"no uplink_gbit for hosts {slow}")
        if (ranks := sum(host.ranks for host in self.hosts)) > MAX_RANKS:
            raise ValueError(f"{ranks} ranks in all, at most {MAX_RANKS}")
        return self

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read and validate a YAML lab file; MoeplanError names file, field, value and rule."""
        try:
            body = parse_yaml(read_text(path, "; examples/labs/ has some", MAX_BYTES), str(path))
        except DocumentError as error:
            raise MoeplanError(str(error)) from None
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise MoeplanError(f"{path}: {describe_rule(error)}") from None

    def ranks(self) -> list[LabHost]:
        """The host of every rank."""
        return [host for host in self.hosts for _ in range(host.ranks)]

    def seated(self) -> list[Seated]:
        """See ``Launcher.seated``; known before a lab is opened."""
        return [Seated(host.name, "cpu", host.cpu_share) for host in self.ranks()]


class Lab:
    """The emulated cluster while the ``with`` block lasts; serves several launches.

    Entering raises MoeplanError without root, without ``ip`` and ``tc`` or a cpu cgroup, or if the shares do not fit
    into this machine's cores. Leaving ends every process in the lab and removes namespaces and cgroups. If this process
    dies without leaving (SIGTERM, kill -9), a watchdog process does it; if that died too, the next lab does.
    """

    _numbers = itertools.count()

    def __init__(self, spec: LabSpec) -> None:
        self.spec = spec
        hosts = spec.ranks()
        self.cores = lab_cpu.place([(host.cpu_share, host.threads) for host in hosts], sorted(os.sched_getaffinity(0)))
        self.prefix = f"moeplan-{os.getpid()}-{next(self._numbers)}-"
        self.network = lab_network.Network(
            self.prefix, {host.name: host.uplink_gbit or spec.uplink_gbit for host in spec.hosts}
        )
        self.shares = lab_cpu.Shares(self.prefix, [host.cpu_share for host in hosts], self.cores)
        self.guard = contextlib.ExitStack()

    def __enter__(self) -> Self:
        lab_network.check_tools()
        root = lab_cpu.prepare()
        clean_stale(root)
        with contextlib.ExitStack() as guard:
            guard.enter_context(guarded(self.prefix, root))
            self.network.build()
            self.shares.build()
            self.guard = guard.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.guard.close()

    def popen(self, host: str, argv: Sequence[str], environment: dict[str, str] | None = None, **options: Any) -> Any:
        """Start a program on a host, as ``subprocess.Popen``: its network, but no limit of processor time."""
        if host not in self.network.addresses:
            raise MoeplanError(f"lab {self.spec.name} has no host {host!r}, only {sorted(self.network.addresses)}")
        environment = os.environ | {"GLOO_SOCKET_IFNAME": lab_network.INTERFACE} | (environment or {})
        return subprocess.Popen([*self.network.prefix(host), *argv], env=environment, **options)

    def address(self, host: str) -> str:
        """IP address of a host, known in the lab only."""
        return self.network.addresses[host]


class LabLauncher:
    """Ranks on the hosts of an open lab."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def seated(self) -> list[Seated]:
        """See ``Launcher.seated``."""
        return self.lab.spec.seated()

    def run(
        self, entry: str, job: dict[str, Any], *, timeout: float, on_event: Callable[[Event], None] | None = None
    ) -> list[dict[str, Any]]:
        """See ``Launcher.run``. Ranks get their share of processor time once all of them have started."""
        hosts = self.lab.spec.ranks()
        seats = [
            Seat(
                host=host.name,
                cores=cores,
                threads=host.threads,
                cpu_share=host.cpu_share,
                prefix=self.lab.network.prefix(host.name),
                environment={"GLOO_SOCKET_IFNAME": lab_network.INTERFACE},
            )
            for host, cores in zip(hosts, self.lab.cores, strict=True)
        ]

        supervisor = Supervisor(seats, self.lab.address(hosts[0].name))
        return supervisor.run(entry, job, timeout, on_event, before=self.lab.shares.held)

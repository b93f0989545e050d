"""Ranks as processes on this machine."""

import os
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch

from ...spec.errors import MoeplanError
from .rank import Event, Seated, divide_cores
from .supervise import Seat, Supervisor


class LocalLauncher:
    """``ranks`` processes that divide this machine's cores, or take one GPU each.

    ``threads`` limits the computing threads of a rank (default: its cores). ``port`` fixes the rendezvous port; 0 takes
    a free one. Raises MoeplanError where the machine has too few GPUs or cores.
    """

    def __init__(
        self, ranks: int, kind: Literal["cpu", "cuda"] = "cpu", threads: int | None = None, port: int = 0
    ) -> None:
        if ranks < 1:
            raise MoeplanError(f"ranks: at least 1 is needed (got {ranks})")
        if kind == "cuda" and torch.cuda.device_count() < ranks:
            raise MoeplanError(f"{ranks} ranks need {ranks} GPUs, this machine has {torch.cuda.device_count()}")
        cores = divide_cores(sorted(os.sched_getaffinity(0)), ranks)
        fewest = min(len(own) for own in cores)
        if threads is not None and not 1 <= threads <= fewest:
            raise MoeplanError(f"threads: each of {ranks} ranks has {fewest} core(s) here (got {threads})")
        sharers = Counter(core for own in cores for core in own)
        self.port = port
        self.seats = [
            Seat(
                host=socket.gethostname(),
                cores=own,
                threads=threads or len(own),
                cpu_share=sum(1 / sharers[core] for core in own),
                device="cpu" if kind == "cpu" else f"cuda:{rank}",
                environment={"GLOO_SOCKET_IFNAME": "lo"},
            )
            for rank, own in enumerate(cores)
        ]

    def seated(self) -> list[Seated]:
        """See ``Launcher.seated``."""
        return [seat.seated() for seat in self.seats]

    def run(
        self, entry: str, job: dict[str, Any], *, timeout: float, on_event: Callable[[Event], None] | None = None
    ) -> list[dict[str, Any]]:
        """See ``Launcher.run``."""
        return Supervisor(self.seats, "127.0.0.1", self.port).run(entry, job, timeout, on_event)

"""What an entry function is given, and how every launcher calls it."""

import importlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from ...spec.errors import MoeplanError
from ..groups import giving_way

Event = dict[str, Any]
Entry = Callable[["Rank", dict[str, Any]], dict[str, Any]]

# A collective gives up this long after the launcher's own timeout, so that the launcher, which knows all ranks,
# speaks first; where there is no launcher above (torchrun) it is what ends a hang.
COLLECTIVE_GRACE = 30.0


class Seated(NamedTuple):
    """Where a rank is, or is going to be; None: not known yet. kind: ``cpu`` or ``cuda``."""

    host: str | None = None
    kind: str | None = None
    cpu_share: float | None = None


@dataclass(frozen=True)
class Rank:
    """This process's place in the run.

    ``hosts`` names the host of every rank; ``threads`` computing threads and ``cpu_share`` cores' worth of processor
    time belong to this rank (several threads may share a core).
    """

    rank: int
    world: int
    hosts: tuple[str, ...]
    device: torch.device
    threads: int
    cpu_share: float
    send: Callable[[Event], None] = field(repr=False, compare=False)

    def emit(self, event: Event) -> None:
        """Report progress: a sign of life from every rank; rank 0's events reach the launcher's ``on_event``."""
        self.send(event)

    def seated(self) -> list[Seated]:
        """What this rank knows of all: everyone's host, the rest of itself."""
        known = [Seated(host) for host in self.hosts]
        known[self.rank] = Seated(self.hosts[self.rank], self.device.type, self.cpu_share)
        return known


class Launcher(Protocol):
    """Runs an entry in every rank's process."""

    def seated(self) -> list[Seated]:
        """What is known of every rank before any starts."""
        ...

    def run(
        self, entry: str, job: dict[str, Any], *, timeout: float, on_event: Callable[[Event], None] | None = None
    ) -> list[dict[str, Any]]:
        """Call ``entry`` ("moeplan.package.module:function") with ``(rank, job)`` in every rank.

        Returns every rank's result, JSON as ``job`` is, in rank order. Raises RunError naming the rank that failed
        first, or that gave no sign of life (start, progress event, result) for ``timeout`` seconds while nobody did.
        """
        ...


def resolve_entry(entry: str) -> Entry:
    """The function behind "moeplan.package.module:function"; nothing outside moeplan is ever called."""
    module, _, name = entry.partition(":")
    if not module.startswith("moeplan.") or not name.isidentifier():
        raise MoeplanError(f"entry {entry!r}: expected 'moeplan.package.module:function'")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise MoeplanError(f"entry {entry!r}: {error}") from None
    return function


def join(rank: int, world: int, device: torch.device, store: dist.Store | None, timeout: float) -> None:
    """Initialise torch.distributed: gloo between CPUs, NCCL between GPUs; ``store`` None reads the environment.

    Raises MoeplanError where another rank has this rank's GPU.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if world > 1:
            if store is None:
                store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timedelta(seconds=timeout)))
            claim_gpu(rank, device, store)
    with giving_way() if device.type == "cpu" else nullcontext():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout + COLLECTIVE_GRACE),
            device_id=device if device.type == "cuda" else None,
        )


def claim_gpu(rank: int, device: torch.device, store: dist.Store) -> None:
    """Raise MoeplanError where a rank that came first has the same GPU; NCCL would end both, with a message of its own.

    A GPU's UUID is its own among all hosts'.
    """
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    first = store.compare_set(f"moeplan/gpu/{uuid}", "", str(rank)).decode()
    if first != str(rank):
        raise MoeplanError(
            f"ranks {first} and {rank} have one GPU, {device} (GPU-{uuid}), and NCCL needs one for each: start as many "
            "ranks on a host as it has GPUs, and show each rank its own (CUDA_VISIBLE_DEVICES)"
        )


def to_json(result: Any) -> str:
    """The result of an entry as JSON; anything else is refused rather than converted."""
    try:
        return json.dumps(result, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise MoeplanError(f"the result is not JSON: {error}") from None


def describe(error: BaseException) -> str:
    """One line: a MoeplanError as it is, any other with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, MoeplanError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def divide_cores(cores: Sequence[int], ranks: int) -> list[list[int]]:
    """Cores of each rank: consecutive and disjoint where there are enough, else one each, shared."""
    if ranks > len(cores):
        return [[cores[r * len(cores) // ranks]] for r in range(ranks)]
    bounds = [r * len(cores) // ranks for r in range(ranks + 1)]
    return [list(cores[a:b]) for a, b in pairwise(bounds)]


def pin(cores: Sequence[int]) -> None:
    """Pin this process, with the threads that it already has, to these cores."""
    for task in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(task), cores)

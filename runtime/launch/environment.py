"""Ranks that someone else started: torchrun or Slurm. This process is one of them."""

import atexit
import json
import os
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from ipaddress import ip_address
from typing import Any, Literal

import torch
import torch.distributed as dist

from ...spec.errors import MoeplanError, RunError
from .rank import Event, Rank, Seated, describe, divide_cores, join, pin, resolve_entry, to_json
from .secret_store import ADVICE, SecretStore, Server


@dataclass(frozen=True)
class Place:
    """This process among all, as the environment says. ``node`` numbers the hosts."""

    rank: int
    world: int
    local: int
    node: int


def read_place(environment: dict[str, str]) -> Place | None:
    """None where neither torchrun nor Slurm started this process."""
    for names in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID"),
    ):
        found = [environment.get(name) for name in names]
        if found[0] is None or found[1] is None:
            continue
        try:
            rank, world, local, node = (int(value or 0) for value in found)
        except ValueError:
            raise MoeplanError(f"{', '.join(names)}: expected whole numbers, got {found}") from None
        if not 0 <= rank < world:
            raise MoeplanError(f"{names[0]}: expected 0 to {world - 1}, got {rank}")
        return Place(rank, world, local, node)
    return None


class EnvironmentLauncher:
    """Runs entries in this process, beside its peers; every rank gets all results.

    ``rank`` tells the caller which one it is: only rank 0 should write files. The rendezvous is MASTER_ADDR and
    MASTER_PORT, set by torchrun (under Slurm by the job script); see ``meet``.
    """

    def __init__(self, kind: Literal["cpu", "cuda"] = "cpu", threads: int | None = None) -> None:
        place = read_place(dict(os.environ))
        if place is None:
            raise MoeplanError("neither torchrun nor Slurm started this process (no RANK, no SLURM_PROCID)")
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise MoeplanError(f"{name} is not set: rank 0's address and a free port of it must be known")
        self.place = place
        self.rank = place.rank
        self.device = torch.device("cpu") if kind == "cpu" else own_gpu(place)
        self.threads = threads
        self.seat: Rank | None = None
        self.store: dist.Store | None = None  # the process group holds its C++ half alone

    @staticmethod
    def present() -> bool:
        """Whether torchrun or Slurm started this process."""
        return read_place(dict(os.environ)) is not None

    def seated(self) -> list[Seated]:
        """See ``Launcher.seated``: how many, and what this one computes on; hosts are told when the ranks meet."""
        known = [Seated()] * self.place.world
        known[self.rank] = Seated(kind=self.device.type)
        return known

    def run(
        self, entry: str, job: dict[str, Any], *, timeout: float, on_event: Callable[[Event], None] | None = None
    ) -> list[dict[str, Any]]:
        """See ``Launcher.run``; a failing rank raises here, and torchrun or Slurm ends its peers."""
        place, function = self.place, resolve_entry(entry)
        try:
            if not dist.is_initialized():
                self.store = meet(place, dict(os.environ), timeout)
                join(place.rank, place.world, self.device, self.store, timeout)
                atexit.register(leave)
            self.seat = self.seat or self.sit_down()
            send = on_event if on_event and place.rank == 0 else ignore
            result = to_json(function(replace(self.seat, send=send), job))
            results = [json.loads(text) for text in gather(result, self.device)]
        except MoeplanError:
            raise
        except Exception as error:
            raise RunError(f"rank {place.rank} (host {socket.gethostname()}): {describe(error)}") from error
        return results

    def sit_down(self) -> Rank:
        """Agree on host names and divide each host's cores among its ranks, unless that was done already."""
        place, name = self.place, socket.gethostname()
        mine: dict[str, Any] = {"host": name, "node": place.node, "cores": sorted(os.sched_getaffinity(0))}
        all_places = [json.loads(text) for text in gather(json.dumps(mine), self.device)]
        nodes = Counter(host for host, _ in {(p["host"], p["node"]) for p in all_places})
        hosts = tuple(p["host"] if nodes[p["host"]] == 1 else f"{p['host']}-{p['node']}" for p in all_places)
        peers = [r for r, host in enumerate(hosts) if host == hosts[place.rank]]
        cores, sharers = mine["cores"], 1
        if len(peers) > 1 and all(all_places[r]["cores"] == cores for r in peers):
            divided = divide_cores(cores, len(peers))
            cores = divided[peers.index(place.rank)]
            sharers = divided.count(cores)
            pin(cores)
        threads = self.threads or len(cores)
        torch.set_num_threads(threads)
        return Rank(place.rank, place.world, hosts, self.device, threads, len(cores) / sharers, ignore)


def own_gpu(place: Place) -> torch.device:
    """The GPU of this rank's number on its host, or the only one that it is shown, as Slurm does with a GPU per task.

    Whether another rank has it too is seen when they meet (``rank.claim_gpu``).
    """
    seen = torch.cuda.device_count()
    if seen <= place.local and seen != 1:
        raise MoeplanError(f"rank {place.rank} needs GPU {place.local}, it sees {seen}")
    return torch.device("cuda", place.local if seen > place.local else 0)


def meet(place: Place, environment: dict[str, str], timeout: float) -> dist.Store | None:
    """The rendezvous at MASTER_ADDR and MASTER_PORT: torchrun's own (None), else one that asks for MOEPLAN_SECRET.

    Rank 0 listens on MASTER_ADDR and no other address. Raises MoeplanError without a secret where that is no loopback
    address: whoever reaches it could lead ranks elsewhere.
    """
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    host, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise MoeplanError(f"MASTER_PORT: expected 1 to 65535, got {port!r}")
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise MoeplanError(f"MASTER_ADDR {host!r}: {error.strerror}") from None
    secret = environment.get("MOEPLAN_SECRET", "")
    if not secret and not ip_address(address).is_loopback:
        raise MoeplanError(f"MOEPLAN_SECRET is not set, and others can reach the rendezvous at {host}: {ADVICE}")
    if place.rank == 0:
        Server(address, int(port), secret.encode())
    return SecretStore(address, int(port), secret.encode(), timedelta(seconds=timeout))


def gather(text: str, device: torch.device) -> list[str]:
    """Every rank's text, in rank order; travels as padded bytes."""
    own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(own)], device=device))
    longest = max(int(n) for n in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(own)] = own.to(device)
    rows = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(rows, padded)
    return [bytes(row[: int(n)].tolist()).decode() for row, n in zip(rows, lengths, strict=True)]


def ignore(event: Event) -> None:
    """Nobody asked for progress."""


def leave() -> None:
    """At the process's normal end; a failed one must not wait for its peers."""
    if dist.is_initialized():
        dist.destroy_process_group()

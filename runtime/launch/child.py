"""The process of one rank: ``python -m moeplan.runtime.launch.child FD``, started by a supervisor.

It speaks JSON lines. Out, on the pipe FD: ``ready`` (rank 0 with the port of the rendezvous), ``event``, and at the end
``result`` or ``error``. In, on stdin, one line each: who it is and what to call, and, once all
ranks are ready, the job. Whatever
libraries print goes to the rank's log.
"""

import ctypes
import faulthandler
import json
import os
import signal
import sys
import threading
import traceback
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ...spec.errors import MoeplanError
from .rank import Rank, describe, join, resolve_entry, to_json

PR_SET_PDEATHSIG = 1


class Pipe:
    """Writes whole JSON lines; safe for several threads."""

    def __init__(self, descriptor: int) -> None:
        self.file = os.fdopen(descriptor, "w")
        self.lock = threading.Lock()

    def send(self, kind: str, **content: Any) -> None:
        line = json.dumps({"kind": kind, **content}) + "\n"
        with self.lock:
            self.file.write(line)
            self.file.flush()


def die_with(parent: int) -> None:
    """Ask the kernel for SIGKILL when the parent dies; it may be dead already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def open_store(address: str, port: int, world: int) -> dist.TCPStore:
    """Rank 0's rendezvous; port 0 takes a free one."""
    try:
        return dist.TCPStore(address, port, world, is_master=True, wait_for_workers=False)
    except dist.DistNetworkError as error:
        why = "port in use" if "EADDRINUSE" in str(error) else describe(error)
        raise MoeplanError(f"cannot listen on {address} port {port}: {why}; choose another port") from None


def call(me: dict[str, Any], pipe: Pipe) -> str:
    """Meet the other ranks, run the entry, return its result as JSON."""
    rank, world, entry = me["rank"], me["world"], resolve_entry(me["entry"])
    store = open_store(me["address"], me["port"], world) if rank == 0 else None
    pipe.send("ready", port=store.port if store else None)
    order = json.loads(sys.stdin.readline() or "null")
    if order is None:
        raise MoeplanError("the launcher went away before the run began")
    if store is None:
        patience = timedelta(seconds=order["timeout"])
        store = dist.TCPStore(me["address"], order["port"], world, is_master=False, timeout=patience)
    device = torch.device(me["device"])
    torch.set_num_threads(me["threads"])
    join(rank, world, device, store, order["timeout"])
    place = Rank(
        rank=rank,
        world=world,
        hosts=tuple(me["hosts"]),
        device=device,
        threads=me["threads"],
        cpu_share=me["cpu_share"],
        send=lambda event: pipe.send("event", event=event),
    )
    result = to_json(entry(place, order["job"]))
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()
    return result


def main() -> int:
    faulthandler.register(signal.SIGUSR1)  # the supervisor asks a silent rank where it is
    me = json.loads(sys.stdin.readline())
    die_with(me["parent"])
    pipe = Pipe(int(sys.argv[1]))
    try:
        result = call(me, pipe)
    except Exception as error:
        traceback.print_exc()
        # A rank whose peer died sees a broken connection: a consequence, not the cause to name.
        consequence = isinstance(error, dist.DistError) or "onnection" in str(error) or "gloo" in str(error)
        pipe.send("error", error=describe(error), expected=isinstance(error, MoeplanError), consequence=consequence)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # without waiting for the threads of a broken process group
    pipe.send("result", result=result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

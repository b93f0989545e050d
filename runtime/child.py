"""The process of one rank: ``python -m moeplan.runtime.child FD``, started by a supervisor.

It speaks JSON lines. Out, on the pipe FD: ``ready`` (rank 0 with the port of the rendezvous), ``event``, and at the end
``result`` or ``error``. In, on stdin, one line each: who it is and what to call, and, once all
ranks are ready, the job. Whatever
libraries print goes to the rank's log.

It lies outside the launch package, which imports torch: what ties this process to its parent, and lets it be asked
where it is, comes first.
"""

import ctypes
import errno
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import traceback
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..spec.errors import MoeplanError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PR_SET_PDEATHSIG = 1
BACKLOG = 4096  # connections of ranks that come at once


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


def open_store(address: str, port: int, world: int) -> "TCPStore":
    """Rank 0's rendezvous, on ``address`` and no other interface of this host; port 0 takes a free one.

    The store itself has no secret: whoever reaches it can read and set its keys. ``address`` is loopback, or an
    address inside a lab's own network.
    """
    import torch.distributed as dist

    listener = socket.socket()
    try:
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        why = "port in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise MoeplanError(f"cannot listen on {address} port {port}: {why}; choose another port") from None
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address, port, world, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def call(me: dict[str, Any], pipe: Pipe) -> str:
    """Meet the other ranks, run the entry, return its result as JSON."""
    import torch
    import torch.distributed as dist

    from .launch.rank import Rank, join, resolve_entry, to_json

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


def is_consequence(error: Exception) -> bool:
    """A rank whose peer died sees a broken connection: a consequence, not the cause to name."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or "onnection" in str(error) or "gloo" in str(error)


def main() -> int:
    faulthandler.register(signal.SIGUSR1)  # the supervisor asks a silent rank where it is
    me = json.loads(sys.stdin.readline())
    die_with(me["parent"])
    pipe = Pipe(int(sys.argv[1]))
    try:
        result = call(me, pipe)
    except Exception as error:
        from .launch.rank import describe

        traceback.print_exc()
        expected = isinstance(error, MoeplanError)
        pipe.send("error", error=describe(error), expected=expected, consequence=is_consequence(error))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # without waiting for the threads of a broken process group
    pipe.send("result", result=result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

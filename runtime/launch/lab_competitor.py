"""A process that competes with the lab's ranks for a core; run by path, it imports nothing of moeplan.

``spin``: uses whatever its group's other processes leave (SCHED_IDLE: they go first, at once), so that the group
always claims its weight. ``tick``: wakes often, does nothing; each wake makes the kernel settle who runs, which it
would else do only at its own ticks of 4 ms or so.
"""

import ctypes
import os
import signal
import sys
import time

TICK = 0.00025
PR_SET_PDEATHSIG = 1


def main(kind: str, parent: int) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    sys.stdin.read()  # until this process is in its group
    if kind == "spin":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        while True:
            pass
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    while True:
        time.sleep(TICK)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

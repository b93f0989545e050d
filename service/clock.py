"""When the command began: time limits count from there, not from where its input has been read."""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

LONGEST = 600.0  # seconds of start-up that are believed


def began() -> float:
    """``time.perf_counter()`` at which the command began: with its process; inside another program, now."""
    names = {Path(argument).stem for argument in sys.orig_argv[1:3]}
    return time.perf_counter() - (_age() if "moeplan" in names else 0.0)


def _age() -> float:
    """Seconds since the process began; where the system does not tell, the processor time that it has used."""
    with suppress(OSError, ValueError, IndexError, AttributeError):
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        if 0 <= age <= LONGEST:
            return age
    return time.process_time()

"""Dry only: every kernel in its default configurations compiled for sm_80 and sm_90, as the driver will get it."""

from collections.abc import Iterator

from moeplan.benchmarks.gpu.stage import Row, Settings, command, judged
from moeplan.runtime.kernels.gpu.config import HEIGHTS

STAGE = "cubins"
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes of a block


def rows(settings: Settings) -> Iterator[Row]:
    """In a process without the interpreter, which compiles nothing."""
    found = command(["-m", "moeplan.runtime.kernels.gpu.compiled", "--brief"], TRITON_INTERPRET="0")
    built = [line.split("\t") for line in found.stdout.splitlines() if line.count("\t") == 6]
    for label, dtype, height, tile, target, shared, lost in built:
        what = f"{label} {dtype}, {height} rows, {tile}, sm_{target}"
        good = int(shared) <= SHARED[int(target)] and int(lost) == 0
        yield Row(STAGE, what, f"{int(shared) / 1024:.0f} KiB, {lost} spilled", "", judged(good), detail=True)
    for arch, limit in SHARED.items():
        mine = [line for line in built if int(line[4]) == arch]
        most = max((int(line[5]) for line in mine), default=0)
        spilled = sum(int(line[6]) for line in mine)
        enough = found.returncode == 0 and len(mine) >= 3 * (len(HEIGHTS) if arch >= 90 else 2)
        yield Row(
            STAGE,
            f"sm_{arch}: {len(mine)} kernels, most shared memory",
            f"{most / 1024:.0f} KiB, {spilled} bytes spilled",
            f"<= {limit / 1024:.0f} KiB, 0",
            judged(enough and most <= limit and spilled == 0),
        )

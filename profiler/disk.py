"""What the disk of a device's host gives: direct reads of files, as the runtime reads experts that rest there."""

import time
from random import Random

import torch

from ..runtime.tiers import ExpertFile, places_for
from ..spec.cluster import Disk
from .grids import Coordinates, Grid, Point, grow, steps
from .measure import Bench, Pace, measure, timer

FILE_BYTES = 128 << 20  # of each device: written, since what was never written is not read from the disk
SIZES = Grid({"bytes": 1 << 18}, steps("bytes", 1 << 22, 1 << 24, 1 << 20, 1 << 26), needed=2)
PACE = Pace(0.05, 1.0)  # seconds: a disk that others use as well varies within less


def measure_disk(bench: Bench, folder: str, allowance: float) -> tuple[Disk, float]:
    """All ranks together, each with a file of its own; and the seconds that it took.

    Raises MoeplanError for a folder that cannot be used.
    """
    begin = time.perf_counter()
    file = ExpertFile(folder, 1, FILE_BYTES)
    place = places_for(1, FILE_BYTES, torch.device("cpu"))[0]
    place.random_(generator=torch.Generator().manual_seed(bench.rank))
    file.write(0, place)
    draw = Random(bench.rank)

    def visit(point: Coordinates) -> Point:
        part = place[: point["bytes"]]

        def read() -> None:
            file.read_at(draw.randrange(FILE_BYTES // len(part)) * len(part), part)

        timing = measure(timer([read], torch.device("cpu"), time.perf_counter), bench.agree, PACE)
        return Point(timing, bench.agree(timing.median), 0.0)

    try:
        disk = Disk(folder=folder, read=grow(SIZES, visit, PACE, allowance))
        return disk, bench.agree(time.perf_counter() - begin)
    finally:
        file.close()

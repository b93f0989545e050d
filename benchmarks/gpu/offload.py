"""Stage 7: hot experts on the GPU, cold ones in host memory (dry: in memory and on a disk)."""

from collections.abc import Iterator

from moeplan.benchmarks.gpu.running import DRY_WORKLOADS, WORKLOADS, solve_and_run
from moeplan.benchmarks.gpu.stage import Row, Settings

STAGE = "offload"
MEMORY, DRY_MEMORY = "8GiB", "40MiB"  # of a device: less than the model's experts take


def rows(settings: Settings) -> Iterator[Row]:
    workload = (DRY_WORKLOADS if settings.dry else WORKLOADS)["decode"]
    memory = DRY_MEMORY if settings.dry else MEMORY
    yield from solve_and_run(settings, STAGE, "offload", workload, "--strategy", "offload", "--memory", memory)

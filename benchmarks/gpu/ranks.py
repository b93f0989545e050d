"""Stage 6: two ranks on one GPU are refused with our own message, whichever way they are started, before NCCL is asked.

Dry: what torch says of the GPU comes from ``one_gpu``.
"""

from collections.abc import Iterator
from pathlib import Path

from moeplan.benchmarks.gpu.profiling import DRY_MODEL
from moeplan.benchmarks.gpu.stage import Row, Settings, command, judged

STAGE = "ranks"
STANDIN = Path(__file__).with_name("one_gpu.py")


def rows(settings: Settings) -> Iterator[Row]:
    entry = [str(STANDIN)] if settings.dry else ["-m", "moeplan"]
    output = settings.folder / "two-ranks.json"
    arguments = ["profile", "--device", "cuda", "--model", DRY_MODEL, "--output", str(output)]
    found = command([*entry, *arguments, "--ranks", "2"])
    wanted = "2 ranks need 2 GPUs, this machine has 1"
    good = found.returncode == 2 and wanted in found.stdout
    yield Row(STAGE, "--ranks 2", wanted if good else f"exit code {found.returncode}", "exit code 2", judged(good))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = command([*launcher, *entry, *arguments])
    # torchrun's own exit code is 1; it prints that of the rank.
    lines = [line for line in found.stdout.splitlines() if "have one GPU" in line]
    good = found.returncode != 0 and len(lines) == 1 and "exitcode  : 2" in found.stdout and not _nccl(found.stdout)
    yield Row(STAGE, "torchrun, two processes", lines[0] if lines else "not refused", "exit code 2", judged(good))
    yield Row(STAGE, "no file is written", str(not output.exists()), "", judged(not output.exists()))


def _nccl(text: str) -> bool:
    return "ncclInvalidUsage" in text or "Duplicate GPU detected" in text

"""Stage 8: compute-sanitizer's memcheck over the kernels on small, ragged sizes.

    python -m moeplan.benchmarks.gpu.memcheck [--dry]

runs the cases alone. torch's pool is off, or an access beyond a tensor would still be inside the pool's memory.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import torch

from moeplan.benchmarks.gpu.cases import inputs, layer_on
from moeplan.benchmarks.gpu.kernels_check import TOLERANCE, of_layer, of_operators
from moeplan.benchmarks.gpu.stage import FAILED, Row, Settings, command, judged, last_line
from moeplan.benchmarks.kernels_alternatives import Shape

STAGE = "memcheck"
SIZES = (
    Shape("gated", 72, 56, 3, 2),
    Shape("biased", 33, 17, 5, 3, "swiglu_clamped"),
    Shape("plain", 24, 40, 2, 1, "relu", 1),
)
FOUND = 99  # the exit code where memcheck found something
POOL_OFF = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "MOEPLAN_TUNE": "0"}


def rows(settings: Settings) -> Iterator[Row]:
    dry = ["--dry"] if settings.dry else []
    found = command(["-m", "moeplan.benchmarks.gpu.memcheck", *dry], **POOL_OFF)
    yield Row(STAGE, "the cases alone", last_line(found.stdout), "exit code 0", judged(found.returncode == 0))
    tool = shutil.which("compute-sanitizer")
    if tool is None or settings.dry:
        yield Row(STAGE, "compute-sanitizer", "not on the PATH" if tool is None else "dry: not run", "", "not found")
        return
    yield sanitized(tool)


def sanitized(tool: str) -> Row:
    program = [sys.executable, "-P", "-m", "moeplan.benchmarks.gpu.memcheck"]
    asked = [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND), "--target-processes", "all", *program]
    done = subprocess.run(asked, env=os.environ | POOL_OFF, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    summary = next((line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line), last_line(done.stdout))
    if "not supported" in done.stdout + done.stderr:  # gVisor lets no debugger at the device
        return Row(STAGE, "compute-sanitizer memcheck", last_line(done.stdout), "", "not found")
    good = done.returncode == 0 and "ERROR SUMMARY: 0 errors" in done.stdout
    return Row(
        STAGE, "compute-sanitizer memcheck", summary.strip("= "), "0 errors", judged(good) if summary else FAILED
    )


def main() -> None:
    dry = "--dry" in sys.argv[1:]
    device = torch.device("cpu" if dry else "cuda:0")
    worst, cases = 0.0, 0
    for shape in SIZES[:1] if dry else SIZES:
        layer = layer_on(shape, torch.float32, device)
        for tokens in (5,) if dry else (1, 37):
            given = inputs(shape, torch.float32, device, tokens, skewed=True)
            errors = of_layer(layer, given) | of_operators(layer, given)
            worst, cases = max(worst, *errors.values()), cases + 1
    print(f"{cases} cases, worst error {worst:.1e}")
    raise SystemExit(0 if worst <= TOLERANCE["f32"] else 1)


if __name__ == "__main__":
    main()

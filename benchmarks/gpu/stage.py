"""What the stages have in common: rows of results, settings, timing, commands; and how one stage is run.

    python -m moeplan.benchmarks.gpu.stage NAME FOLDER [--dry]

runs the function ``rows`` of one stage's module and adds each row to FOLDER/results.jsonl as soon as it is there, so
that a stage that is stopped or fails leaves what it had found.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from moeplan.benchmarks.kernels_measure import Timing, timing

OK, FAILED, TOLD = "ok", "FAILED", "-"


class Row(NamedTuple):
    """One line: what was looked at, what came out, what was wanted; ``verdict``: ok, FAILED, "-" where nothing is
    judged, or why there is nothing. Details stay out of the printed table."""

    stage: str
    what: str
    figure: str
    want: str = ""
    verdict: str = TOLD
    detail: bool = False


class Settings(NamedTuple):
    """dry: on the processor, in Triton's interpreter; folder: for all files, and for what one stage leaves another."""

    dry: bool
    folder: Path

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda:0")

    @property
    def ceilings(self) -> dict[str, float]:
        """What ``facts`` measured: bytes / s of a copy, flop / s of a bf16 product."""
        path = self.folder / "ceilings.json"
        if not path.exists():
            raise SystemExit(f"no {path.name}: the stage facts has to run before this one")
        return json.loads(path.read_text())


def judged(good: bool) -> str:
    return OK if good else FAILED


def timed(call: Callable[[], object], device: torch.device, budget: float = 0.2, most: int = 30) -> Timing:
    """Seconds of one call by CUDA events, or by the clock without a GPU; a first call does not count.

    Calls follow one another without waiting, as in a step.
    """
    if device.type != "cuda":
        return timing([clocked(call)])
    call()
    synchronize(device)
    begin = time.perf_counter()
    marks = list[tuple[torch.cuda.Event, torch.cuda.Event]]()
    while len(marks) < 3 or (len(marks) < most and time.perf_counter() - begin < budget):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        marks.append((first, last))
        if len(marks) % 10 == 0:
            synchronize(device)
    synchronize(device)
    return timing([a.elapsed_time(b) / 1e3 for a, b in marks])


def clocked(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def command(arguments: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run python with these arguments; its output goes to the stage's log as well."""
    found = subprocess.run(
        [sys.executable, "-P", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(f"$ {' '.join(arguments)}\n{found.stdout}[exit code {found.returncode}]", flush=True)
    # The logs of ranks that failed stay in the temporary folder, which nobody brings home.
    for log in sorted(Path(tempfile.gettempdir()).glob("moeplan-run-*/rank*.log")):
        print(f"{log.name}:\n{log.read_text(errors='replace')[-4000:]}", flush=True)
        log.unlink()
    return found


def moeplan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return command(["-m", "moeplan", *arguments], COLUMNS="120")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "no output"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    rows = importlib.import_module(f"moeplan.benchmarks.gpu.{given.name}").rows
    with open(given.folder / "results.jsonl", "a") as file:
        for row in rows(Settings(given.dry, given.folder)):
            file.write(json.dumps(row._asdict()) + "\n")
            file.flush()
            print(*row, sep=" | ", flush=True)


if __name__ == "__main__":
    main()

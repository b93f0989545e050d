"""Shows every CUDA path of moeplan on one GPU, in well under eight minutes; prints a table last.

    benchmarks/gpu/run.sh [--dry] [--out FOLDER] [--stages NAME ...]

Stages run one after the other (dry some side by side), each in a process of its own with a ceiling of its own, the
rest of the time where that is less; one that fails is told in the table and does not keep the others from running.
FOLDER (default $OUT, else build/gpu) then holds at most eight files: results.jsonl (every figure), gpu-h200.md (the
page for benchmarks/results), log.txt (what the stages printed), cluster.json, sm_90.json (tuned tiles), reports.
``bring_home.py FOLDER`` puts them into the repository. Exit code 0 where every stage ended and nothing failed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from moeplan.benchmarks.gpu.page import page, table
from moeplan.benchmarks.gpu.stage import FAILED, Row, last_line

ROOT = Path(__file__).parents[2]
TOTAL, DRY_TOTAL = 430, 900  # seconds of all stages together
HOME = (
    "results.jsonl",
    "cluster.json",
    "sm_90.json",
    "report-prefill.json",
    "report-decode.json",
    "report-offload.json",
)


class Stage(NamedTuple):
    """A module; the seconds that it may take on a GPU, None where it has nothing to do there; its lane in a dry run: 0
    and 1 at the same time, then 2, which measures and wants the processor for itself."""

    name: str
    ceiling: int | None
    lane: int


STAGES = (
    Stage("facts", 40, 0),
    Stage("cubins", None, 1),
    Stage("kernels_check", 110, 0),
    Stage("kernels_time", 150, 0),
    Stage("profiling", 80, 2),
    Stage("running", 100, 2),
    Stage("ranks", 60, 1),
    Stage("offload", 60, 2),
    Stage("memcheck", 60, 1),
)
DRY_CEILING = 300  # of each: a machine may be busy, and no GPU is waiting


def run_stage(stage: Stage, folder: Path, dry: bool, seconds: float) -> Row:
    """How it ended; its rows are in the folder's results.jsonl, what it printed in STAGE.log."""
    arguments = ["-m", "moeplan.benchmarks.gpu.stage", stage.name, str(folder), *(["--dry"] if dry else [])]
    begin = time.monotonic()
    path = folder / f"{stage.name}.log"
    with open(path, "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-P", *arguments], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            end = "" if code == 0 else f"exit code {code}: {last_line(path.read_text(errors='replace'))}"
        except subprocess.TimeoutExpired:
            end = f"stopped: its {seconds:.0f} s are over"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.wait()
    took = f"{time.monotonic() - begin:.0f} s"
    return Row(stage.name, "the stage", f"{took}, {end}" if end else took, "", FAILED if end else "ok")


def run_lane(stages: Sequence[Stage], folder: Path, given: argparse.Namespace, end: float) -> None:
    """These stages one after the other."""
    for stage in stages:
        left = end - time.monotonic()
        if left < 5:
            add(folder, Row(stage.name, "the stage", "not begun: the time of all is over", "", FAILED))
        else:
            print(f"{stage.name} ...", flush=True)
            ceiling = DRY_CEILING if given.dry else stage.ceiling or 0
            add(folder, run_stage(stage, folder, given.dry, min(ceiling, left)))
        save(folder, given.out, given.dry)


def read(folder: Path) -> list[Row]:
    """In the order of the stages, whichever were at work at the same time."""
    path, names = folder / "results.jsonl", [stage.name for stage in STAGES]
    rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    return sorted(rows, key=lambda row: names.index(row.stage))


def add(folder: Path, row: Row) -> None:
    with open(folder / "results.jsonl", "a") as file:
        file.write(json.dumps(row._asdict()) + "\n")


def save(folder: Path, out: Path, dry: bool) -> None:
    """Copy what is to be brought home, after every stage: a run that is ended from outside leaves what it had."""
    out.mkdir(parents=True, exist_ok=True)
    for name in HOME:
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / name)
    logs = [(stage.name, folder / f"{stage.name}.log") for stage in STAGES]
    text = "".join(f"\n===== {name}\n{log.read_text(errors='replace')}" for name, log in logs if log.exists())
    (out / "log.txt").write_text(text)
    (out / "gpu-h200.md").write_text(page(read(folder), dry, f"benchmarks/gpu/run.sh{' --dry' if dry else ''}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the processor: Triton's interpreter, small sizes")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"))
    parser.add_argument("--stages", nargs="+", choices=[s.name for s in STAGES], default=[s.name for s in STAGES])
    given = parser.parse_args()
    if not given.dry and not torch.cuda.is_available():
        raise SystemExit("no GPU that torch can use here: --dry shows everything on the processor")
    if given.dry:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    end = time.monotonic() + (DRY_TOTAL if given.dry else TOTAL)
    chosen = [s for s in STAGES if s.name in given.stages and (given.dry or s.ceiling is not None)]
    together = [[s for s in chosen if s.lane == lane] for lane in (0, 1)] if given.dry else []
    last = [s for s in chosen if s.lane == 2] if given.dry else chosen
    with tempfile.TemporaryDirectory(prefix="moeplan-gpu-") as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        for done in [pool.submit(run_lane, lane, folder, given, end) for lane in together]:
            done.result()
        run_lane(last, folder, given, end)
        save(folder, given.out, given.dry)
        rows = read(folder)
    failed = sum(row.verdict == FAILED for row in rows)
    print(table(rows))
    print(f"{len(rows)} rows, {failed} failed; files in {given.out}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()

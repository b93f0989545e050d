"""Shows every CUDA path of moeplan on one GPU, in well under eight minutes; prints a table last.

    benchmarks/gpu/run.sh [--dry] [--out FOLDER] [--stages NAME ...]

Stages run one after the other, each in a process of its own with a ceiling of its own, the rest of the time where that
is less; one that fails is told in the table and does not keep the others from running. FOLDER (default $OUT, else
build/gpu) then holds at most eight files: results.jsonl (every figure), gpu-h200.md (the page for benchmarks/results),
log.txt (what the stages printed), cluster.json, sm_90.json (tuned configurations) and the reports of the runs.
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
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from moeplan.benchmarks.gpu.page import page, table
from moeplan.benchmarks.gpu.stage import FAILED, Row

ROOT = Path(__file__).parents[2]
TOTAL, DRY_TOTAL = 430, 600  # seconds of all stages together
HOME = (
    "results.jsonl",
    "cluster.json",
    "sm_90.json",
    "report-prefill.json",
    "report-decode.json",
    "report-offload.json",
)


class Stage(NamedTuple):
    """A module, and the seconds that it may take: on a GPU, and dry. None: it does not run there."""

    name: str
    ceiling: int | None
    dry: int | None


STAGES = (
    Stage("facts", 40, 60),
    Stage("cubins", None, 300),
    Stage("kernels_check", 110, 120),
    Stage("kernels_time", 130, 120),
    Stage("profiling", 80, 120),
    Stage("running", 100, 150),
    Stage("ranks", 60, 60),
    Stage("offload", 60, 60),
    Stage("memcheck", 60, 60),
)


def run_stage(stage: Stage, folder: Path, dry: bool, seconds: float) -> Row:
    """How it ended; its rows are in the folder's results.jsonl, what it printed in log.txt."""
    arguments = ["-m", "moeplan.benchmarks.gpu.stage", stage.name, str(folder), *(["--dry"] if dry else [])]
    begin = time.monotonic()
    with open(folder / "log.txt", "ab") as log:
        log.write(f"\n===== {stage.name}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [sys.executable, "-P", *arguments], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            end = "" if code == 0 else f"exit code {code}: {_last(folder / 'log.txt')}"
        except subprocess.TimeoutExpired:
            end = f"stopped: its {seconds:.0f} s are over"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.wait()
    took = f"{time.monotonic() - begin:.0f} s"
    return Row(stage.name, "the stage", f"{took}, {end}" if end else took, "", FAILED if end else "ok")


def _last(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def read(folder: Path) -> list[Row]:
    path = folder / "results.jsonl"
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def add(folder: Path, row: Row) -> None:
    with open(folder / "results.jsonl", "a") as file:
        file.write(json.dumps(row._asdict()) + "\n")


def save(folder: Path, out: Path, dry: bool, command: str) -> list[Row]:
    """Copy what is to be brought home, after every stage: a run that is ended from outside leaves what it had."""
    rows = read(folder)
    out.mkdir(parents=True, exist_ok=True)
    for name in (*HOME, "log.txt"):
        if (folder / name).exists():
            shutil.copyfile(folder / name, out / name)
    (out / "gpu-h200.md").write_text(page(rows, dry, command))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on the processor: Triton's interpreter, small sizes")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu"))
    parser.add_argument("--stages", nargs="+", choices=[s.name for s in STAGES], default=[s.name for s in STAGES])
    given = parser.parse_args()
    command = " ".join(["benchmarks/gpu/run.sh", *(["--dry"] if given.dry else [])])
    if given.dry:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    end = time.monotonic() + (DRY_TOTAL if given.dry else TOTAL)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="moeplan-gpu-") as name:
        folder = Path(name)
        for stage in STAGES:
            ceiling = stage.dry if given.dry else stage.ceiling
            if stage.name not in given.stages or ceiling is None:
                continue
            left = end - time.monotonic()
            if left < 5:
                add(folder, Row(stage.name, "the stage", "not begun: the time of all is over", "", FAILED))
            else:
                print(f"{stage.name} ...", flush=True)
                add(folder, run_stage(stage, folder, given.dry, min(ceiling, left)))
            rows = save(folder, given.out, given.dry, command)
    failed = sum(row.verdict == FAILED for row in rows)
    print(table(rows))
    print(f"{len(rows)} rows, {failed} failed; files in {given.out}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()

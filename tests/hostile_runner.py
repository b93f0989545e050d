"""Runs hostile cases through the command line, each in a fork of a process that has imported everything.

``python -m moeplan.tests.hostile_runner FIRST LAST STEP`` prints a line of JSON for each case that did not end as it
must: exit code 0, or 2 with one line that says why; in bounded processor time and memory, and with no file half
written. A fork starts in milliseconds where a fresh process would import for seconds.
"""

import contextlib
import importlib
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moeplan.tests.hostile_seeds import Case, draw, make_seeds

SECONDS, MEMORY, PATIENCE = 10, 2**30, 120
STOPPED = "stopped by the test: all was read"
# What may stand beside the one line of an error: notes, a warning's opening, and on a slow machine how far it is.
BESIDE = re.compile(r"note:|moeplan:|[\w ]+, \d+ s: ")


def prepare() -> None:
    """Import what any command imports, compile, and stop `run` and `profile` where they would start ranks."""
    import moeplan.profiler
    import moeplan.profiler.families
    import moeplan.profiler.traces
    import moeplan.runtime.run
    import moeplan.service.app
    from moeplan.runtime.launch import choose
    from moeplan.runtime.launch.rank import Seated
    from moeplan.solvers.compiled import load_all
    from moeplan.spec.errors import MoeplanError

    load_all()
    with contextlib.suppress(ImportError):  # an extra
        import transformers

        transformers.AutoConfig.for_model("mixtral")
    for name in moeplan.service.app.COMMANDS:  # else each case would import its own
        importlib.import_module(f"moeplan.service.commands.{name}")

    class Launcher:
        def __init__(self, ranks: int, *_: object, **__: object) -> None:
            self.ranks = ranks

        def seated(self) -> list[Seated]:
            return [Seated()] * self.ranks

        def run(self, entry: str, job: dict[str, Any], **_: object) -> list[dict[str, Any]]:
            if folder := job.get("weights_folder"):
                read_weights(job["plan"], folder)
            raise MoeplanError(STOPPED)

    class Lab:
        def __init__(self, spec: Any) -> None:
            raise MoeplanError(STOPPED)

    choose.LocalLauncher = Launcher  # type: ignore[assignment, misc]
    choose.Lab = Lab  # type: ignore[assignment, misc]


def read_weights(plan: str, folder: str) -> None:
    """What the ranks would read of a checkpoint."""
    import torch

    from moeplan.runtime.checkpoint import Checkpoint
    from moeplan.spec import Plan

    source = Checkpoint(Plan.parse(plan, "plan").model, folder, torch.float32)
    source.embedding(), source.head(), source.final_norm()
    for layer in range(len(source.model.layers)):
        source.layer(layer)


def run_case(case: Case, folder: Path, log: Path) -> dict[str, Any]:
    """Fork, run the command in ``folder``, and report how it ended."""
    started, child = time.monotonic(), os.fork()
    if child == 0:
        _be_the_command(case, folder, log)
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - started > PATIENCE:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    code = os.waitstatus_to_exitcode(status)
    return {
        "case": case.name,
        "argv": case.argv,
        "code": code,
        "out": (log / "out").read_text(errors="replace"),
        "err": (log / "err").read_text(errors="replace"),
        "seconds": usage.ru_utime + usage.ru_stime,
        "bytes": usage.ru_maxrss * 1024,
        "left": [path.name for path in folder.iterdir() if path.name.startswith(".moeplan-")],
    }


def _be_the_command(case: Case, folder: Path, log: Path) -> None:
    code = 70
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(log / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_CPU, (4 * SECONDS, 4 * SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
        sys.argv = ["moeplan", *case.argv]
        from moeplan.service import cli

        cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def fault(ended: dict[str, Any]) -> str | None:
    """What is wrong with how a case ended."""
    err = ended["err"]
    if "Traceback" in err or "Exception ignored" in err:
        return "traceback"
    if ended["code"] not in (0, 2):
        return f"exit code {ended['code']}"
    if ended["left"]:
        return f"left {ended['left']}"
    if ended["seconds"] > SECONDS:
        return f"{ended['seconds']:.1f} s of processor time"
    if ended["bytes"] > MEMORY:
        return f"{ended['bytes'] >> 20} MiB"
    if ended["code"] == 2 and not err.lstrip().startswith("Usage:"):
        errors = [line for line in err.splitlines() if not BESIDE.match(line)]
        if len(errors) != 1 or not errors[0].startswith("error: ") or not errors[0].isprintable():
            return "not one line"
        if re.search(r"error: (\w*Error|\w*Exception)\b", errors[0]) or len(errors[0]) > 2000:
            return "no message for a user"
    return None


def run_cases(numbers: range) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as place:
        seeds, log = Path(place, "seeds"), Path(place, "log")
        seeds.mkdir(), log.mkdir()
        make_seeds(seeds)
        prepare()
        for number in numbers:
            with tempfile.TemporaryDirectory(dir=place) as folder:
                yield run_case(drawn(number, seeds, Path(folder)), Path(folder), log)


def drawn(number: int, seeds: Path, folder: Path) -> Case:
    """Draw a case in a fork: what its files took of memory must not count in the cases after it."""
    answer = folder.with_suffix(".drawn")
    child = os.fork()
    if child == 0:
        try:
            case = draw(number, seeds, folder)
            answer.write_text(json.dumps([case.name, case.argv]))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, f"case {number} could not be drawn"
    name, argv = json.loads(answer.read_text())
    answer.unlink()
    return Case(name, argv)


if __name__ == "__main__":
    codes: dict[int, int] = {}
    reached = 0
    for ended in run_cases(range(*map(int, sys.argv[1:]))):
        codes[ended["code"]] = codes.get(ended["code"], 0) + 1
        reached += STOPPED in ended["err"]
        if problem := fault(ended):
            ended["out"] = ended["out"][:200]
            ended["err"] = ended["err"] if len(ended["err"]) < 3000 else ended["err"][:1000] + ended["err"][-2000:]
            print(json.dumps({"problem": problem, **ended}), flush=True)
    print(json.dumps({"codes": codes, "reached": reached}), flush=True)

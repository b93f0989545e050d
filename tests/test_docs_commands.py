"""The commands of README and docs: each block is run, in a folder of its document, or says why it is not."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moeplan import Report
from moeplan.website.commands import Commands, File, problems, steps, steps_of
from moeplan.website.pages import ROOT, documents

SECONDS = 400  # in which a command must end; together they take under three minutes on two quiet cores
CHECKED = [document for document in documents() if document == "README.md" or document.startswith("docs/")]
PROGRAMS = {"moeplan": "-m moeplan", "python": "", "torchrun": "-m torch.distributed.run"}


def runnable(document: str) -> bool:
    return any(isinstance(step, Commands) and not step.not_run for step in steps(document))


class Runner:
    """Runs commands in folders. One that was run before, in a folder with the same files, is not run again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        for name, module in PROGRAMS.items():
            program = self.bin / name
            program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
            program.chmod(0o755)
        # Passive: torch's threads would spin, for minutes where other programs have the processors.
        self.environment = {"PATH": f"{self.bin}:{os.environ['PATH']}", "COLUMNS": "120", "OMP_WAIT_POLICY": "PASSIVE"}
        self.done: dict[tuple[str, str], dict[str, bytes]] = {}
        self.ran: list[str] = []

    def new(self, document: str) -> Path:
        """An empty folder but for the examples."""
        here = self.folder / document.replace("/", "-")
        here.mkdir()
        (here / "examples").symlink_to(ROOT / "examples")
        return here

    def run(self, command: str, where: str, here: Path) -> None:
        before = files(here)
        key = (command, digest(before))
        if key not in self.done:
            self.ran.append(command)
            environment = os.environ | self.environment
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=here,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            after = files(here)
            if not (done.returncode == 1 and only_late(command, before, after)):
                assert done.returncode == 0, f"{where}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            self.done[key] = {name: data for name, data in after.items() if before.get(name) != data}
        for name, data in self.done[key].items():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_bytes(data)


def only_late(command: str, before: dict[str, bytes], after: dict[str, bytes]) -> bool:
    """Whether a run wrote a report, whose output is right: its exit code is 1 then where the step's time is not as
    predicted, which on a machine in use says nothing of the command."""
    new = after.get("report.json")
    if " run " not in command or new is None or new == before.get("report.json"):
        return False
    check = Report.parse(new.decode(), "report.json").check
    return check is not None and check.passed


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder; what it only links to is not in it."""
    found = [Path(top, name) for top, _, names in os.walk(folder) for name in names]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def digest(found: dict[str, bytes]) -> str:
    total = hashlib.sha256()
    for name in sorted(found):
        total.update(name.encode() + b"\0" + hashlib.sha256(found[name]).digest())
    return total.hexdigest()


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("documents"))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("document", [document for document in CHECKED if runnable(document)])
def test_commands_run(document: str, runner: Runner) -> None:
    here = runner.new(document)
    for step in steps(document):
        if isinstance(step, File):
            (here / step.name).write_text(step.text)
        elif not step.not_run:
            for command in (*step.first, *step.lines):
                runner.run(command, step.where, here)
    shutil.rmtree(here)


@pytest.mark.parametrize("document", CHECKED)
def test_commands_are_as_written_here(document: str) -> None:
    """Also those that are not run: their commands, options, targets and files exist."""
    found = [step for step in steps(document) if isinstance(step, Commands)]
    wrong = [
        f"{step.where}: {what}" for step in found for line in (*step.first, *step.lines) for what in problems(line)
    ]
    assert wrong == []


def test_the_documents_are_looked_at() -> None:
    found = [step for document in CHECKED for step in steps(document) if isinstance(step, Commands)]
    assert len(found) > 25
    assert sum(not step.not_run for step in found) >= 8
    assert {"README.md", "docs/clusters.md", "docs/strategies/copies.md"} <= {s.where.partition(":")[0] for s in found}


TEXT = """\
Text, and `moeplan missing`.

<!-- run first:
moeplan profile
moeplan models -->

```sh
moeplan solve --model a \\
    --seed 1    # a remark

make lint
```

    moeplan run plan.json

<!-- a remark -->
<!-- not run: needs root -->

```sh
anything at all
```

    no command

```text
moeplan run plan.json
```

<!-- file: a.json -->

```json
{}
```
"""


def test_blocks_are_found_and_told_apart() -> None:
    assert list(steps_of(TEXT, "a.md")) == [
        Commands(
            "a.md:7",
            ("moeplan solve --model a --seed 1    # a remark", "make lint"),
            "",
            ("moeplan profile", "moeplan models"),
        ),
        Commands("a.md:14", ("moeplan run plan.json",), ""),
        Commands("a.md:19", ("anything at all",), "needs root"),
        File("a.json", "{}\n"),
    ]


def test_a_remark_only_counts_directly_before_its_block() -> None:
    (step,) = steps_of("<!-- not run: needs root -->\n\nText.\n\n```sh\nmoeplan models\n```\n", "a.md")
    assert isinstance(step, Commands)
    assert not step.not_run


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("moeplan profil", "moeplan has no command profil"),
        ("moeplan solve --modle a", "moeplan solve has no option --modle"),
        ("moeplan trace stats a.npz --to b", "moeplan trace stats has no option --to"),
        ("moeplan trace imports a", "moeplan trace has no command imports"),
        ("torchrun --nnodes 2 -m moeplan run --missing", "moeplan run has no option --missing"),
        ("make everything", "make everything: no such target"),
        ("python examples/missing.py", "examples/missing.py: no such file"),
        ("python -m moeplan.benchmarks.missing --all", "moeplan.benchmarks.missing: no such module"),
    ],
)
def test_a_stale_command_is_seen(command: str, problem: str) -> None:
    assert problems(command) == [problem]


@pytest.mark.parametrize(
    "command",
    [
        "moeplan solve -m a --memory=12MiB --even   # --missing",
        "moeplan --version",
        "moeplan trace capture --help",
        "moeplan --server http://127.0.0.1:8321 --token-file t solve -m a",
        "torchrun --nnodes 2 --node-rank R -m moeplan profile",
        "make bench-kills MOMENTS=4",
        "make bench-lab",
        "python examples/tiny_moe/train.py --output a",
        "python -m moeplan.benchmarks.by_batch --devices 8",
        "python -m sglang.launch_server --tp-size 32",
        "# only a remark",
    ],
)
def test_a_command_that_exists_is_not_reported(command: str) -> None:
    assert problems(command) == []


def test_what_was_run_is_not_run_again(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    first, second, third = (runner.new(name) for name in "abc")
    (third / "in").write_text("1")
    for here in (first, second, third):
        runner.run("test -e in && echo there > out || echo gone > out", "a.md:1", here)
    assert len(runner.ran) == 2
    assert [(here / "out").read_text().strip() for here in (first, second, third)] == ["gone", "gone", "there"]


def test_a_command_that_fails_is_named(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    with pytest.raises(AssertionError, match=r"a.md:1: moeplan solv(.|\n)*No such command"):
        runner.run("moeplan solv | cat", "a.md:1", runner.new("a"))

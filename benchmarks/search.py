"""How long ``solve`` takes and what it finds, beside an earlier commit, from two devices' hosts to thousands.

    python -m moeplan.benchmarks.search --old ../old

Both solve the same synthetic clusters (``synthetic_clusters``) in turn, in processes of their own, one after another;
``--old`` is a checkout of commit ca805b8, which is made in a temporary folder where it is not given. Sizes that an
older moeplan cannot read in a reasonable time are solved by this tree alone. Writes ``results/search.md`` and
``results/search.png``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moeplan.benchmarks.hardware import processor
from moeplan.benchmarks.synthetic_clusters import LIKE

HERE = Path(__file__).resolve().parent
COMMIT = "ca805b8"
MODELS = ("mixtral", "qwen3-235b-a22b", LIKE)
WORKLOADS = {8: "prefill:4096", 16: "prefill:4096", 32: "prefill:4096", 320: "prefill:131072", 4096: "prefill:1638400"}
PER_HOST = 8


@dataclass(frozen=True)
class Solved:
    """seconds: ``solve_seconds`` of the plan; step: predicted seconds; mib: peak memory of the process."""

    seconds: float
    step: float
    gap: float
    status: str
    mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--old", type=Path, help=f"checkout of the commit to compare with, by default {COMMIT}")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--devices", default="8,16,32,320,4096")
    parser.add_argument("--old-devices", default="8,16", help="sizes that the earlier commit solves too")
    parser.add_argument("--repeats", type=int, default=1, help="of each; medians are shown")
    parser.add_argument("--time-limit", type=int, default=300)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "search.md")
    given = parser.parse_args()
    sizes, old_sizes = ([int(n) for n in text.split(",")] for text in (given.devices, given.old_devices))
    unknown = set(sizes) - set(WORKLOADS)
    if unknown:
        parser.error(f"--devices {sorted(unknown)}: expected some of {', '.join(map(str, WORKLOADS))}")
    shown = ["OLD" if given.old and arg == str(given.old) else arg for arg in sys.argv[1:]]
    command = " ".join(["python -m moeplan.benchmarks.search", *shown])
    with tempfile.TemporaryDirectory() as folder, checkout(given.old) as old:
        rows = []
        for model in given.models.split(","):
            for devices in sizes:
                trees = {"new": HERE.parent} | ({"old": old} if devices in old_sizes else {})
                found = compare(Path(folder), trees, model, devices, given.repeats, given.time_limit)
                rows.append((model, devices, found))
                print(row(*rows[-1]), flush=True)
                given.output.write_text(report(rows, command, given.repeats))  # a stop keeps what there is
                draw(rows, given.output.with_suffix(".png"))


@contextmanager
def checkout(given: Path | None) -> Iterator[Path]:
    """The tree to compare with."""
    if given is not None:
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "old"
        git = ["git", "-C", str(HERE.parent), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), COMMIT], check=True, capture_output=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def compare(
    folder: Path, trees: dict[str, Path], model: str, devices: int, repeats: int, time_limit: int
) -> dict[str, Solved]:
    """Medians of ``repeats`` runs of each tree, in turn."""
    files, asked = {}, model
    for name in trees:
        files[name] = folder / f"{model}-{devices}-{name}.json"
        command = ["-m", "moeplan.benchmarks.synthetic_clusters", "--hosts", str(max(1, devices // PER_HOST))]
        command += ["--devices", str(min(PER_HOST, devices)), "--model", model, "--output", str(files[name])]
        command += ["--first-version"] if name == "old" else []
        if model == LIKE:
            asked = str(folder / "model.json")
            command += ["--write-model", asked]
        subprocess.run([sys.executable, *command], check=True, capture_output=True)
    runs: dict[str, list[Solved]] = {name: [] for name in trees}
    for _ in range(repeats):
        for name, tree in trees.items():
            output = folder / f"plan-{name}.json"
            command = ["-m", "moeplan", "solve", "--model", asked, "--cluster", str(files[name])]
            command += ["--workload", WORKLOADS[devices], "--time-limit", str(time_limit), "--output", str(output)]
            runs[name].append(run(folder, tree, command, output))
    return {name: median(found) for name, found in runs.items()}


def run(folder: Path, tree: Path, command: Sequence[str], output: Path) -> Solved:
    """One process of one tree, under this interpreter; the repository's root is the package."""
    environment = dict(os.environ)
    if tree != HERE.parent:  # this tree is what is installed, its compiled loops with it
        home = folder / "path"
        home.mkdir(exist_ok=True)
        if not (home / "moeplan").exists():
            (home / "moeplan").symlink_to(tree)
        environment["PYTHONPATH"] = str(home)
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen([sys.executable, *command], env=environment, stdout=nowhere, cwd=folder)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{tree}: moeplan {' '.join(command[2:])} failed")
    plan = json.loads(output.read_text())
    solver = plan["solver"]
    mib = usage.ru_maxrss / 1024
    return Solved(plan["solve_seconds"], solver["objective"], solver["gap"], solver["status"], mib)


def median(runs: Sequence[Solved]) -> Solved:
    middle = sorted(runs, key=lambda run: run.seconds)[len(runs) // 2]
    seconds = statistics.median(run.seconds for run in runs)
    return Solved(seconds, middle.step, middle.gap, middle.status, max(run.mib for run in runs))


def row(model: str, devices: int, found: dict[str, Solved]) -> str:
    new, old = found["new"], found.get("old")
    cells = [model, f"{devices:,}", WORKLOADS[devices], f"{old.seconds:.1f}" if old else "", f"{new.seconds:.2f}"]
    cells += [f"{old.seconds / new.seconds:.0f}x" if old else "", f"{old.step:.5g}" if old else "", f"{new.step:.5g}"]
    cells += [f"{100 * new.gap:.2f} %", f"{old.status}" if old else "", new.status]
    cells += [f"{old.mib:.0f}" if old else "", f"{new.mib:.0f}"]
    return f"| {' | '.join(cells)} |"


def report(rows: Sequence[tuple[str, int, dict[str, Solved]]], command: str, repeats: int) -> str:
    heads = ["model", "devices", "workload", f"s, {COMMIT}", "s", "ratio", f"step, {COMMIT}", "step", "gap"]
    heads += [f"status, {COMMIT}", "status", f"MiB, {COMMIT}", "MiB"]
    lines = [
        "# The search for a plan",
        "",
        f"`{command}`, {processor()}. Synthetic clusters, {PER_HOST} devices a host; `solve_seconds` (s), predicted "
        f"step seconds (step) and peak memory of the process, {repeats} run(s) of each in turn.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(row(*entry) for entry in rows),
        "",
        "![growth](search.png)",
        "",
    ]
    return "\n".join(lines)


def draw(rows: Sequence[tuple[str, int, dict[str, Solved]]], path: Path) -> None:
    """Seconds over devices, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for i, model in enumerate(dict.fromkeys(model for model, _, _ in rows)):
        for name, style in (("new", "o-"), ("old", "x--")):
            points = [(n, found[name].seconds) for m, n, found in rows if m == model and name in found]
            if points:
                label = f"{model}, {COMMIT if name == 'old' else 'this tree'}"
                axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label)
    axes.set(xscale="log", yscale="log", xlabel="devices", ylabel="seconds of solve")
    axes.set_xticks(sorted({n for _, n, _ in rows}), [f"{n:,}" for n in sorted({n for _, n, _ in rows})])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()

"""Batch-aware selection of experts on the trained tiny model: time saved against divergence, over settings.

    python -m moeplan.benchmarks.selection [--model FOLDER] [--widen 1,16] [--batches 8,32] [--output FILE.md]

FOLDER is what examples/tiny_moe/train.py wrote; without it the model is trained first (minutes). The tiny model's
experts are so small that calls cost more than weights. ``--widen M`` repeats every FFN column of every expert M times
and divides its output by M: the same function, and so the same divergence, with experts M times as large. For each
width and number of sequences this profiles, solves and runs as the commands do; a run times steps with and without the
selection in turn, and reads the held-out text.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import fmean

from rich.console import Console
from safetensors.torch import load_file, save_file

from moeplan import Plan, Report, profile, run, solve
from moeplan.benchmarks.hardware import processor
from moeplan.spec.catalogue import load_model
from moeplan.spec.document import write_atomically

HERE = Path(__file__).parent
TRAIN = HERE.parent / "examples" / "tiny_moe" / "train.py"
CONTEXT = 64  # with the compared steps less than the 128 tokens that it was trained on
console = Console(stderr=True)


def widen(folder: Path, times: int, target: Path) -> Path:
    """A checkpoint of the same function whose experts have ``times`` as many FFN columns."""
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] *= times
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("w1.weight", "w3.weight")):
            tensors[name] = tensor.repeat_interleave(times, 0).contiguous()
        elif name.endswith("w2.weight"):
            tensors[name] = (tensor.repeat_interleave(times, 1) / times).contiguous()
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def compared(plan: Plan, select: str, weights: Path, text: Path, repetitions: int | None) -> Report:
    report = run(
        plan, weights=weights, text=text, select=select, quality_budget=1e9, tolerance=1e9, repetitions=repetitions
    )
    found = report.selection
    assert found is not None
    assert found.check is not None
    assert found.check.passed, found.check
    console.print(f"  {select}: {found.speedup:.2f} times as fast, {found.divergence:.4f} nats")
    return report


def row(select: str, report: Report) -> str:
    s = report.selection
    assert s is not None
    assert s.perplexity is not None
    before, after = (fmean(getattr(layer, name) for layer in s.layers) for name in ("before", "after"))
    times = f"{s.exact_seconds * 1e3:.2f} | {s.selected_seconds * 1e3:.2f}"
    gain = f"{s.speedup:.2f} ({s.speedup_low:.2f} to {s.speedup_high:.2f})"
    quality = f"{s.divergence:.4f} | {s.changed:.1%} | {s.perplexity[0]:.3f} | {s.perplexity[1]:.3f}"
    return f"| {select} | {before:.1f} | {after:.1f} | {times} | {gain} | {quality} |"


def settings(experts: int, top_k: int) -> list[str]:
    """Both rules: piggyback with fewer than all choices, lynx from few experts to most."""
    steps = [experts * i // 8 for i in range(2, 8)]
    return [f"piggyback:{k}" for k in range(1, top_k)] + [f"lynx:{m}" for m in steps if m >= top_k]


def trained(folder: Path) -> Path:
    console.print("training the tiny model")
    subprocess.run([sys.executable, str(TRAIN), "--output", str(folder)], check=True, stdout=sys.stderr)
    return folder


HEAD = (
    "| selection | distinct experts | selected | step ms | selected ms | times as fast (10th to 90th percentile) "
    "| divergence, nats | likeliest changed | perplexity | selected |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--widen", default="1,16")
    parser.add_argument("--batches", default="8,32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "selection.md")
    args = parser.parse_args()
    sections = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or trained(Path(scratch) / "trained")
        text = folder / "held_out.txt"
        for times in map(int, args.widen.split(",")):
            wide = widen(folder, times, Path(scratch) / f"wide-{times}")
            model = load_model(str(wide / "config.json"))
            moe = model.moe_block().moe
            assert moe is not None
            console.print(f"profiling, experts {times} times as large")
            cluster = profile(model, dtype="f32", ranks=args.ranks, budget_seconds=30, accept_noise=True)
            for batch in args.batches.split(","):
                plan = solve(model, cluster, f"decode:{batch}@{CONTEXT}", dtype="f32", strategy="ep")
                console.print(f"decode:{batch}@{CONTEXT}")
                rows = [
                    row(select, compared(plan, select, wide, text, args.repetitions))
                    for select in settings(moe.num_experts, moe.top_k)
                ]
                size = model.computed_expert_bytes(0, "f32") / 2**20
                title = f"## Experts of {size:.2f} MiB ({times} times the trained ones), decode:{batch}@{CONTEXT}"
                sections.append(f"{title}\n\n{HEAD}" + "\n".join(rows) + "\n")
    options = f"--widen {args.widen} --batches {args.batches} --ranks {args.ranks}"
    machine = f"{processor()}, Linux {platform.release()}, {date.today()}"
    words = (
        f"# Selection of experts on the trained tiny model\n\n{machine}; {args.ranks} ranks, f32, strategy `ep`; "
        f"`python -m moeplan.benchmarks.selection {options}`. The model of `examples/tiny_moe` (8 layers, top-2 of 16 "
        "experts) reads the held-out text; wider experts are the same function. Distinct experts are means over "
        "layers and eight steps, of all devices; steps with and without the selection are timed in turn. Every "
        "selected output equals a single process that selects by the same rule.\n\n"
    )
    document = words + "\n".join(sections)
    write_atomically(args.output, lambda file: file.write(document.encode()))
    print(document)


if __name__ == "__main__":
    main()

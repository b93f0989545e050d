"""Batch-aware selection of experts on the trained tiny model: time saved against divergence, over settings.

    python -m moeplan.benchmarks.selection [--model FOLDER] [--widen 1,16,64] [--batches 8,32] [--output FILE.md]

FOLDER is what examples/tiny_moe/train.py wrote; without it the model is trained first (minutes). The tiny model's
experts are so small that calls cost more than weights. ``--widen M`` repeats every FFN column of every expert M times
and divides its output by M: the same function, and so the same divergence, with experts M times as large. For each
width and number of sequences, steps without a selection and with every setting are timed in turn, under ``ep`` with the
experts divided evenly, after a context of the held-out text; their output is compared as ``moeplan run`` does it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file, save_file

from moeplan import Plan, Trace
from moeplan.benchmarks.hardware import processor
from moeplan.profiler.traces.hugging_face import read_prompts
from moeplan.runtime.check import planned_output, reference_output, relative_error
from moeplan.runtime.checkpoint import Checkpoint
from moeplan.runtime.coherent import executor_of
from moeplan.runtime.launch import LocalLauncher, Rank
from moeplan.runtime.router import Chooser, choose
from moeplan.runtime.selected import COMPARED_STEPS, Selecting, open_selector
from moeplan.runtime.selection import Selector
from moeplan.runtime.worker import step_inputs
from moeplan.spec.catalogue import load_model
from moeplan.spec.document import write_atomically
from moeplan.spec.layout import even
from moeplan.spec.plan import LayerPlan
from moeplan.spec.selection import Selection
from moeplan.tests.plans import even_slots, hand_made_plan

HERE = Path(__file__).parent
TRAIN = HERE.parent / "examples" / "tiny_moe" / "train.py"
WARM_UP = 3  # rounds
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


def on_rank(rank: Rank, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every step [1 + settings][repetitions], the first without a selection, and what each setting does to
    the output; ``errors``: of the selected outputs against the reference, on rank 0."""
    plan, folder = Plan.parse(job["plan"], "plan"), job["folder"]
    torch.set_num_threads(plan.devices[rank.rank].threads)
    source, context = Checkpoint(plan.model, folder, torch.float32, rank.device), plan.workload.context
    executor = executor_of(plan, rank.rank, source, device=rank.device, capacity=context + COMPARED_STEPS)
    first = Selecting.of(plan, executor, job["settings"][0], job["prompts"])
    selectors = [first.selector, *(open_selector(Selection.from_text(text)) for text in job["settings"][1:])]
    clock = process_time if job["processor_time"] else perf_counter
    choosers: list[Chooser] = [choose, *selectors]
    layout, times = executor.layout, list[list[float]]()
    own = first.tokens[layout.own, 0]
    for i in range(job["repetitions"] + WARM_UP):
        row = []
        for chooser in choosers:
            dist.barrier()
            begin = clock()
            executor.step(own, layout, context, chooser=chooser)
            row.append(clock() - begin)
        times += [row] if i >= WARM_UP else []
        rank.emit({"done": i})
    compared = [Selecting(executor, context, s, first.tokens, True).compare() for s in selectors]
    executor.cache.fill(context, plan.seed)
    inputs, layers, errors = step_inputs(plan), len(plan.model.layers), []
    for selector in selectors:
        output = planned_output(executor, inputs, None, context, layers, selector)
        if rank.rank == 0:
            alone = reference_output(plan, source, inputs, None, Selector(selector.selection))
            errors.append(relative_error(output, alone))
    return {"times": times, "compared": compared, "errors": errors}


def rows_of(texts: list[str], results: list[dict[str, Any]]) -> Iterator[str]:
    times = np.max([r["times"] for r in results], axis=0)  # a step lasts as long as on its slowest rank
    assert max(results[0]["errors"]) < 1e-4, results[0]["errors"]
    for i, (text, found) in enumerate(zip(texts, results[0]["compared"], strict=True), 1):
        before, after = np.mean([layer[:2] for layer in found["used"]], axis=0)
        low, ratio, high = np.percentile(times[:, 0] / times[:, i], (10, 50, 90))
        exact, selected = np.median(times[:, [0, i]], axis=0) * 1e3
        perplexity = " | ".join(f"{p:.3f}" for p in found["perplexity"])
        yield (
            f"| {text} | {before:.1f} | {after:.1f} | {exact:.2f} | {selected:.2f} | {ratio:.2f} ({low:.2f} to "
            f"{high:.2f}) | {found['divergence']:.4f} | {found['changed']:.1%} | {perplexity} |"
        )


def origin(folder: Path) -> str:
    """Steps and loss of the training, as its trace says."""
    return Trace.read(folder / "trace.npz").source.partition(";")[0]


def settings(experts: int, top_k: int) -> list[str]:
    """Both rules: piggyback with fewer than all choices, lynx with 2, 3, 4 and 5 eighths of the experts."""
    steps = [experts * i // 8 for i in range(2, 6)]
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
    parser.add_argument("--widen", default="1,16,64")
    parser.add_argument("--batches", default="8,32")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true", help="of one rank, on a machine that others share")
    parser.add_argument("--repetitions", type=int, default=60)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "selection.md")
    args = parser.parse_args()
    sections = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or trained(Path(scratch) / "trained")
        text, trained_by = folder / "held_out.txt", origin(folder)
        for times in map(int, args.widen.split(",")):
            wide = widen(folder, times, Path(scratch) / f"wide-{times}")
            model = load_model(str(wide / "config.json"))
            moe = model.moe_block().moe
            assert moe is not None
            for batch in args.batches.split(","):
                workload, count = f"decode:{batch}@{CONTEXT}", moe.num_experts
                layer = LayerPlan(strategy="ep", slots=even_slots(count, args.ranks))
                tokens = even(int(batch), args.ranks)
                threads = max(1, len(os.sched_getaffinity(0)) // args.ranks)
                plan = hand_made_plan(model, workload, [layer], tokens=tokens, threads=threads)
                console.print(f"experts {times} times as large, {workload}")
                texts = settings(moe.num_experts, moe.top_k)
                prompts = read_prompts(wide, model, text, int(batch), CONTEXT + COMPARED_STEPS + 1, plan.seed)
                job = {
                    "plan": plan.to_json(),
                    "folder": str(wide),
                    "prompts": prompts,
                    "settings": texts,
                    "processor_time": args.processor_time,
                }
                launcher = LocalLauncher(args.ranks)
                entry = "moeplan.benchmarks.selection:on_rank"
                rows = list(rows_of(texts, launcher.run(entry, job | {"repetitions": args.repetitions}, timeout=300)))
                size = model.computed_expert_bytes(0, "f32") / 2**20
                title = f"## Experts of {size:.2f} MiB ({times} times the trained ones), {workload}"
                sections.append(f"{title}\n\n{HEAD}" + "\n".join(rows) + "\n")
    options = f"--widen {args.widen} --batches {args.batches} --ranks {args.ranks} --repetitions {args.repetitions}"
    clock = ""
    if args.processor_time:
        options += " --processor-time"
        clock = "Times are processor time: other programs used the machine. "
    machine = f"{processor()}, Linux {platform.release()}, {date.today()}"
    preface = (
        f"# Selection of experts on the trained tiny model\n\n{machine}; {args.ranks} ranks, f32, strategy `ep`; "
        f"`python -m moeplan.benchmarks.selection {options}`. The model of `examples/tiny_moe` (8 layers, top-2 of 16 "
        "experts) reads the held-out text; wider experts are the same function. Distinct experts are means over "
        "layers and eight steps, of all devices; steps are timed in turn. Every "
        f"selected output equals a single process that selects by the same rule. {clock}The model: {trained_by}.\n\n"
    )
    document = preface + "\n".join(sections)
    write_atomically(args.output, lambda file: file.write(document.encode()))
    print(document)


if __name__ == "__main__":
    main()

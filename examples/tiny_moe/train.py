"""Train a byte-level mixture-of-experts language model on the Python standard library, and record how it routes.

    python examples/tiny_moe/train.py --output DIR --seed 0

DIR then holds a Hugging Face Mixtral folder (config.json, model.safetensors), the held-out text, and trace.npz.
The same seed and number of steps give the same model on the same machine.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from tiny_moe import TinyMoe, save
from torch import Tensor

from moeplan.examples.common.training import (
    BATCH,
    LENGTH,
    Training,
    bits_per_byte,
    record_trace,
    standard_library,
    windows,
)
from moeplan.profiler.traces import trace_stats
from moeplan.service.pages.trace import draw_stats, stats_table
from moeplan.spec import MoeplanError
from moeplan.spec.catalogue import load_model
from moeplan.spec.document import write_atomically

TRACE_SEQUENCES = 64


def train(net: TinyMoe, text: Tensor, *, steps: int, seconds: float, seed: int) -> int:
    """Returns the steps done (fewer than ``steps`` only at the time limit)."""
    generator = torch.Generator().manual_seed(seed)
    training, begin = Training(net, steps), time.monotonic()
    for step in track(range(steps), "training"):
        if time.monotonic() - begin > seconds:
            return step
        training.step(step, windows(text, BATCH, LENGTH + 1, generator))
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the tiny model and record its trace.")
    parser.add_argument("--minutes", type=float, default=10.0, help="Ceiling on the training time.")
    parser.add_argument("--steps", type=int, default=600, help="Training steps; about two minutes on two quiet cores.")
    parser.add_argument("--output", type=Path, default=Path("tiny-moe"), help="Folder to write.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights and of the order of the text.")
    options = parser.parse_args()

    console = Console(width=100)
    text, held_out = standard_library()
    net = TinyMoe(load_model("tiny-moe"), options.seed)
    console.print(f"{len(text) / 1e6:.1f} MB of text to train on, {len(held_out) / 1e6:.1f} MB held out")
    console.print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f} million parameters")

    before, begin = bits_per_byte(net, held_out), time.monotonic()
    steps = train(net, text, steps=options.steps, seconds=60 * options.minutes, seed=options.seed)
    seconds, after = time.monotonic() - begin, bits_per_byte(net, held_out)
    console.print(f"{steps} steps of {BATCH} x {LENGTH} bytes in {seconds:.0f} s")
    console.print(f"held-out loss: {before:.3f} bits per byte before, {after:.3f} after")
    if steps < options.steps:
        console.print(
            f"stopped by --minutes {options.minutes:g} before {options.steps} steps: not reproducible exactly"
        )

    save(net, options.output, max_length=LENGTH)
    sample = windows(held_out, TRACE_SEQUENCES, LENGTH, torch.Generator().manual_seed(options.seed))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    source = (
        f"examples/tiny_moe/train.py: {steps} steps, seed {options.seed}, {after:.2f} bits per byte; "
        f"held-out standard library of Python {version}, {TRACE_SEQUENCES} sequences x {LENGTH} bytes"
    )
    trace = record_trace(net, sample, source)
    trace.write(options.output / "trace.npz")
    stats = trace_stats(trace)
    draw_stats(stats, options.output / "stats.png")
    written = held_out.numpy().tobytes()
    write_atomically(options.output / "held_out.txt", lambda f: f.write(written))
    console.print(stats_table(stats))
    console.print(f"wrote config.json, model.safetensors, trace.npz, stats.png and held_out.txt to {options.output}")


if __name__ == "__main__":
    try:
        main()
    except MoeplanError as error:
        sys.exit(f"error: {error}")

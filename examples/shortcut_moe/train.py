"""Train a model with a shortcut beside the standard one, step by step on the same text, and show both losses.

    python examples/shortcut_moe/train.py --output DIR --seed 0

DIR then holds, for each form in a folder of its own, model.json, model.safetensors (the standard form also a Hugging
Face config.json) and trace.npz, and losses.json, which steps.py reads. The same seed and steps give the same models.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
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
from moeplan.examples.shortcut_moe.shortcut_moe import FORMS, ShortcutMoe, form_model, save
from moeplan.runtime.checkpoint import Checkpoint
from moeplan.runtime.reference import ReferenceModel
from moeplan.spec import MoeplanError
from moeplan.spec.document import write_atomically

TRACE_SEQUENCES = 32

Losses = dict[int, dict[str, float]]
"""Held-out bits per byte of every form, by steps done."""


def train(
    nets: dict[str, ShortcutMoe], text: Tensor, held_out: Tensor, *, steps: int, evaluations: int, seed: int
) -> tuple[Losses, dict[str, np.ndarray]]:
    """All nets take a step in turn, on the same batch. Returns losses and the seconds of each step [steps] by form."""
    generator = torch.Generator().manual_seed(seed)
    trainings = {form: Training(net, steps) for form, net in nets.items()}
    seconds: dict[str, list[float]] = {form: [] for form in nets}
    at = {round(steps * i / evaluations) for i in range(evaluations + 1)}
    losses: Losses = {0: {form: bits_per_byte(net, held_out) for form, net in nets.items()}}
    for step in track(range(steps), "training"):
        batch = windows(text, BATCH, LENGTH + 1, generator)
        for form, training in trainings.items():
            begin = time.perf_counter()
            training.step(step, batch)
            seconds[form].append(time.perf_counter() - begin)
        if step + 1 in at:
            losses[step + 1] = {form: bits_per_byte(net, held_out) for form, net in nets.items()}
    return losses, {form: np.array(found) for form, found in seconds.items()}


def parameters(net: ShortcutMoe) -> int:
    return sum(p.numel() for p in net.parameters())


def table(nets: dict[str, ShortcutMoe], losses: Losses, seconds: dict[str, np.ndarray]) -> Table:
    """One column per form."""
    shown = Table(box=None)
    shown.add_column("held-out bits per byte")
    for form in nets:
        shown.add_column(form, justify="right")
    for step, found in losses.items():
        shown.add_row(f"after {step} steps", *(f"{loss:.3f}" for loss in found.values()))
    shown.add_row("parameters", *(f"{parameters(net):,}" for net in nets.values()))
    shown.add_row("training step, ms", *(f"{np.median(found) * 1e3:.0f}" for found in seconds.values()))
    spreads = {form: np.percentile(found, (10, 90)) * 1e3 for form, found in seconds.items()}
    shown.add_row("  10th to 90th percentile", *(f"{low:.0f} to {high:.0f}" for low, high in spreads.values()))
    return shown


@torch.inference_mode()
def difference(net: ShortcutMoe, folder: Path, sample: Tensor) -> float:
    """max |logits of moeplan's reference on the weights in ``folder`` - the net's| / max |the net's|.

    sample: ids [sequences, length].
    """
    wanted, source = net(sample)[0], Checkpoint(net.model, folder, torch.float32)
    sequences, length = sample.shape
    got = ReferenceModel(net.model, source, sequences=sequences, capacity=length).prefill(sample)
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model with a shortcut beside the standard one.")
    parser.add_argument("--steps", type=int, default=400, help="Training steps of each form.")
    parser.add_argument("--evaluations", type=int, default=4, help="How often the held-out loss is taken on the way.")
    parser.add_argument("--output", type=Path, default=Path("shortcut-moe"), help="Folder to write.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights and of the order of the text.")
    options = parser.parse_args()
    if not 1 <= options.evaluations <= options.steps:
        parser.error(f"--evaluations {options.evaluations}: give 1 to {options.steps}, the number of steps")

    console = Console(width=100)
    text, held_out = standard_library()
    console.print(f"{len(text) / 1e6:.1f} MB of text to train on, {len(held_out) / 1e6:.1f} MB held out")
    nets = {form: ShortcutMoe(form_model(form), options.seed) for form in FORMS}
    losses, seconds = train(
        nets, text, held_out, steps=options.steps, evaluations=options.evaluations, seed=options.seed
    )
    console.print(f"{options.steps} steps of {BATCH} x {LENGTH} bytes, seed {options.seed}")
    console.print(table(nets, losses, seconds))

    sample = windows(held_out, TRACE_SEQUENCES, LENGTH, torch.Generator().manual_seed(options.seed))
    for form, net in nets.items():
        save(net, options.output / form, max_length=LENGTH)
        source = f"examples/shortcut_moe/train.py: {form}, {options.steps} steps, seed {options.seed}"
        record_trace(net, sample, source).write(options.output / form / "trace.npz")
        error = difference(net, options.output / form, sample[:4])
        console.print(f"{form}: logits of moeplan's reference on the written weights differ by {error:.0e}")
    final = losses[options.steps]
    written = {form: {"bits_per_byte": final[form], "steps": options.steps, "seed": options.seed} for form in nets}
    body = json.dumps(written, indent=1).encode() + b"\n"
    write_atomically(options.output / "losses.json", lambda f: f.write(body))
    console.print(f"wrote models, traces and losses.json to {options.output}")


if __name__ == "__main__":
    try:
        main()
    except MoeplanError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

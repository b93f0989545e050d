"""Train a byte-level mixture-of-experts language model on the Python standard library, and record how it routes.

    python examples/tiny_moe/train.py --output DIR --seed 0

DIR then holds a Hugging Face Mixtral folder (config.json, model.safetensors), the held-out text, and trace.npz.
The same seed and number of steps give the same model on the same machine.
"""

import argparse
import hashlib
import math
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from tiny_moe import TinyMoe, save
from torch import Tensor

from moeplan.profiler.traces import trace_stats
from moeplan.service.pages.trace import draw_stats, stats_table
from moeplan.spec import MoeplanError, Trace
from moeplan.spec.catalogue import load_model
from moeplan.spec.document import write_atomically

LENGTH = 128  # bytes of a sequence, in training and in the trace
BATCH = 8  # sequences of a step
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 3e-3, 0.05, 0.1
BALANCE = 0.01  # weight of the load-balancing loss: every expert stays alive, and yet they specialise
HELD_OUT = 0.1  # share of the files that training never sees
TRACE_SEQUENCES = 64
# Third-party code, tests and generated tables differ from machine to machine, or are hardly text.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "encodings", "pydoc_data"}


def standard_library() -> tuple[Tensor, Tensor]:
    """The sources of this Python as bytes, uint8 [bytes]: for training, and held out by a hash of the file's name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[bool, list[bytes]] = {False: [], True: []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.isdisjoint(name.parts):
            chance = int.from_bytes(hashlib.sha256(name.as_posix().encode()).digest()[:4]) / 2**32
            texts[chance < HELD_OUT].append(path.read_bytes())
    train, held_out = (np.frombuffer(b"".join(texts[key]), np.uint8).copy() for key in (False, True))
    if min(len(train), len(held_out)) < 200_000:
        raise MoeplanError(f"{root}: too few .py files to train on; use a Python that ships its standard library")
    return torch.from_numpy(train), torch.from_numpy(held_out)


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Random windows of a text: int64 [count, length]."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def train(net: TinyMoe, text: Tensor, *, steps: int, seconds: float, seed: int) -> int:
    """AdamW with warm-up and cosine decay; returns the steps done (fewer than ``steps`` only at the time limit)."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in net.parameters() if p.ndim > 1]
    norms = [p for p in net.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    begin = time.monotonic()
    for step in track(range(steps), "training"):
        if time.monotonic() - begin > seconds:
            return step
        progress = step / steps
        rate = min((step + 1) / (WARM_UP * steps), 0.55 + 0.45 * math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        batch = windows(text, BATCH, LENGTH + 1, generator)
        logits, _, _, balance = net(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) + BALANCE * balance
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return steps


@torch.inference_mode()
def bits_per_byte(net: TinyMoe, text: Tensor, sequences: int = 128) -> float:
    """Mean cross-entropy of the next byte on fixed windows, in bits."""
    batches = windows(text, sequences, LENGTH + 1, torch.Generator().manual_seed(0)).split(BATCH)
    losses = [F.cross_entropy(net(b[:, :-1])[0].flatten(0, 1), b[:, 1:].flatten()).item() for b in batches]
    return float(np.mean(losses)) / math.log(2)


@torch.inference_mode()
def record_trace(net: TinyMoe, sequences: Tensor, source: str) -> Trace:
    """Routing of sequences [count, length], int64."""
    parts = [net(batch) for batch in sequences.split(BATCH)]
    ids = torch.cat([part[1] for part in parts]).numpy()
    weights = torch.cat([part[2] for part in parts]).numpy()
    experts = net.layers[0].moe.num_experts
    lengths = np.full(len(sequences), sequences.shape[1])
    return Trace.of(ids, experts, expert_weights=weights, seq_len=lengths, model=net.model.name, source=source)


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

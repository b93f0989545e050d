"""What the trained examples share: a text that every machine has, its windows, the steps, the evaluation, the trace.

A net has ``model`` (a moeplan Model) and maps ids [sequences, length] to logits, expert ids [T, L, K], gate weights
[T, L, K] (T tokens, L layers with experts, K top-k) and the load-balancing loss.
"""

import hashlib
import math
import sysconfig
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeplan.spec import MoeplanError, Trace

LENGTH = 128  # bytes of a sequence, in training and in the trace
BATCH = 8  # sequences of a step
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 3e-3, 0.05, 0.1
BALANCE = 0.01  # weight of the load-balancing loss: every expert stays alive, and yet they specialise
HELD_OUT = 0.1  # share of the files that training never sees
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


class Training:
    """AdamW with warm-up and cosine decay over ``steps`` steps."""

    def __init__(self, net: nn.Module, steps: int) -> None:
        self.net, self.steps = net, steps
        matrices = [p for p in net.parameters() if p.ndim > 1]
        norms = [p for p in net.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)

    def step(self, index: int, batch: Tensor) -> None:
        """The ``index``-th step, on sequences [count, length + 1]."""
        rate = min((index + 1) / (WARM_UP * self.steps), 0.55 + 0.45 * math.cos(math.pi * (index / self.steps)))
        for group in self._optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        logits, _, _, balance = self.net(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) + BALANCE * balance
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self._optimizer.step()


@torch.inference_mode()
def bits_per_byte(net: nn.Module, text: Tensor, sequences: int = 128) -> float:
    """Mean cross-entropy of the next byte on fixed windows, in bits."""
    batches = windows(text, sequences, LENGTH + 1, torch.Generator().manual_seed(0)).split(BATCH)
    losses = [F.cross_entropy(net(b[:, :-1])[0].flatten(0, 1), b[:, 1:].flatten()).item() for b in batches]
    return float(np.mean(losses)) / math.log(2)


@torch.inference_mode()
def record_trace(net: nn.Module, sequences: Tensor, source: str) -> Trace:
    """Routing of sequences [count, length], int64."""
    parts = [net(batch) for batch in sequences.split(BATCH)]
    ids = torch.cat([part[1] for part in parts]).numpy()
    weights = torch.cat([part[2] for part in parts]).numpy()
    experts = net.model.moe_block().moe.num_experts
    lengths = np.full(len(sequences), sequences.shape[1])
    return Trace.of(ids, experts, expert_weights=weights, seq_len=lengths, model=net.model.name, source=source)

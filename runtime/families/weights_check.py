"""A family's checkpoint read a second time: by the bytes of its files, and by Transformers' ``from_pretrained``."""

import math
import random
import sys
from pathlib import Path
from typing import Any

import torch

from ...spec import Model
from ..audit import TENSORS, VALUES, Audit
from ..memory import available_bytes
from ..transformers_check import TOKENS, TOLERANCE, NotComparable, load, quietly, version
from ..weights_check import comparable_layers
from .checkpoint import FamilyCheckpoint
from .package import import_transformers
from .reference import unmodified

CPU = torch.device("cpu")


def check_family_weights(model: Model, folder: Path, seed: int) -> dict[str, Any]:
    """What ``spec.report.WeightsCheck`` holds, of all layers. On the CPU, in float32.

    Raises DocumentError for a folder that cannot be read.
    """
    source = FamilyCheckpoint(model, model, folder, torch.float32, CPU)
    values, differing = recompute(source, seed)
    layers, error, reason = len(model.layers), None, ""
    try:
        if comparable_layers(model, layers, available_bytes(CPU)) < layers:
            raise NotComparable("the layers do not fit the memory")
        error = logits_error(source, seed)
    except NotComparable as why:
        layers, reason = 0, str(why)
    return {
        "stored": ", ".join(sorted({source.folder.stored(name).dtype.lower() for name in source.targets})),
        "values": values,
        "differing": differing,
        "transformers": version(),
        "layers": layers,
        "tokens": TOKENS if layers else 0,
        "relative_error": error,
        "tolerance": TOLERANCE,
        "reason": reason,
        "passed": differing == 0 and (error is None or error <= TOLERANCE),
    }


def recompute(source: FamilyCheckpoint, seed: int) -> tuple[int, int]:
    """Values of drawn tensors computed from the bytes, and how many of them the model has otherwise.

    Of tensors that become a parameter as they are; what Transformers stacks or splits is compared by the logits alone.
    """
    audit, draw = Audit(source.folder.folder), random.Random(seed)
    plain = sorted(key for key, (_, pattern) in source.targets.items() if pattern is None)
    values = differing = 0
    for key in draw.sample(plain, min(TENSORS, len(plain))):
        (got,) = source.load([key]).values()
        shape = audit.entries[key].shape
        for _ in range(VALUES if got.numel() else 0):
            at = tuple(draw.randrange(size) for size in shape)
            wanted = torch.tensor(audit.value(key, at), dtype=torch.float64).float()
            values += 1
            differing += not torch.equal(got[at].float(), wanted) and not (got[at].isnan() and wanted.isnan())
    return values, differing


@torch.inference_mode()
def logits_error(source: FamilyCheckpoint, seed: int) -> float:
    """max |ours - theirs| / max |theirs| of the logits of a random prompt. Raises NotComparable."""
    model, transformers = source.whole, import_transformers(source.whole.name)
    tokens = torch.randint(model.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    with quietly(transformers):
        theirs = load(transformers, source.folder.folder, None, torch.float32, None)
        wanted = theirs(tokens, use_cache=False).logits.float()
        del theirs
        net = unmodified(model, torch.float32, source, model.moe_layers, {})
        got = net.model(tokens, use_cache=False).logits.float()
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    return error if math.isfinite(error) else sys.float_info.max

"""The weights of a run read a second time by other code: from the files' bytes, and by Transformers."""

import random
from pathlib import Path
from typing import Any

import torch

from ..spec import Model
from .audit import VALUES, Audit
from .check import first_layers, layer_parameters
from .checkpoint import Checkpoint
from .dequantise import folder_quantization
from .memory import available_bytes
from .tensors import PLAIN
from .transformers_check import TOKENS, TOLERANCE, NotComparable, transformers_error, version


def check_weights(model: Model, folder: Path, layers: int, seed: int) -> dict[str, Any]:
    """What ``spec.report.WeightsCheck`` holds, of the first ``layers`` layers of a checkpoint. On the CPU.

    Raises DocumentError for a folder that cannot be read.
    """
    quantization = folder_quantization(folder)
    source = Checkpoint(model, folder, torch.float32)
    values, differing = recompute(source, layers, seed)
    compared, error, reason = comparable_layers(model, layers, available_bytes(torch.device("cpu"))), None, ""
    try:
        if not model.vocab_size or not compared:
            raise NotComparable(
                "the layers do not fit the memory" if model.vocab_size else "the model has no vocabulary"
            )
        error = transformers_error(first_layers(model, compared), folder, quantization, seed)
    except NotComparable as why:
        compared, reason = 0, str(why)
    return {
        "stored": stored_as(source),
        "values": values,
        "differing": differing,
        "transformers": version(),
        "layers": compared,
        "tokens": TOKENS if compared else 0,
        "relative_error": error,
        "tolerance": TOLERANCE,
        "reason": reason,
        "passed": differing == 0 and (error is None or error <= TOLERANCE),
    }


def recompute(source: Checkpoint, layers: int, seed: int) -> tuple[int, int]:
    """Values of drawn matrices computed from the bytes, and how many of them the loader gives otherwise.

    The product of a stored value and its scale is exact in double precision: float32 has one right answer.
    """
    audit, draw = Audit(source.folder), random.Random(seed)
    values = differing = 0
    for layer in range(layers):
        for name in audit.names(layer, seed):
            shape = audit.entries[name].shape
            for _ in range(VALUES):
                at = [draw.randrange(size) for size in shape]
                wanted = torch.tensor(audit.value(name, at), dtype=torch.float64).float()
                got = source.reader.read(name, shape, [(i, i + 1) for i in at]).float().reshape(())
                values += 1
                differing += not torch.equal(got, wanted) and not (got.isnan() and wanted.isnan())
    return values, differing


def stored_as(source: Checkpoint) -> str:
    """ "fp8 (fp8 per block 128x128)", or the dtype of a plain checkpoint's head."""
    quantization = source.reader.quantization
    if quantization is not None and quantization.formats:
        kinds = ", ".join(dict.fromkeys(str(f) for f in quantization.formats))
        return kinds if kinds.startswith(quantization.scheme) else f"{quantization.scheme}: {kinds}"
    folder = source.reader.folder
    found = {folder.stored(n).dtype for n in ("model.norm.weight", "lm_head.weight") if n in folder}
    return ", ".join(sorted(dtype.lower() for dtype in found & set(PLAIN)))


def comparable_layers(model: Model, layers: int, memory: int) -> int:
    """Layers that Transformers holds at once in float32, with a second copy while it loads; 0: not one with experts."""
    outside = 2 * 4 * 2 * model.embedding_parameters()
    while layers and 4 * 2 * sum(map(layer_parameters, model.layers[:layers])) + outside > memory:
        layers -= 1
    return layers if layers > model.moe_layers[0] else 0

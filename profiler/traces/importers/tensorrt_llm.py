"""TensorRT-LLM's expert statistics: the folder EXPERT_STATISTIC_PATH.

``meta_info.json`` with num_experts and num_experts_per_token; ``rank{r}.safetensors`` with keys ``{iteration}_{layer}``
and counts [experts]; layers are the model's own numbers. Counts are summed over ranks and iterations.
"""

import re
from pathlib import Path

import numpy as np

from ....spec.document import parse_object, read_text, show
from ....spec.errors import DocumentError
from ....spec.model import MAX_EXPERTS, MAX_LAYERS
from ....spec.trace import Trace
from .files import read_safetensors, recording, to_array
from .options import Options
from .records import add_counts, counts_trace, ranges

META = "meta_info.json"


def read(path: Path, options: Options) -> tuple[Trace, list[str]]:
    """A statistics folder."""
    if not path.is_dir():
        raise DocumentError(f"{path}: expected TensorRT-LLM's statistics folder ({META}, rank0.safetensors, ...)")
    meta = parse_object(read_text(path / META), str(path / META))
    experts = meta.get("num_experts")
    if type(experts) is not int or not 1 <= experts <= MAX_EXPERTS:
        raise DocumentError(f"{path / META}: num_experts: expected 1..{MAX_EXPERTS}, got {show(experts)}")
    files = [file for file in recording(path, (".safetensors",)) if re.fullmatch(r"rank[0-9]+", file.stem)]
    if not files:
        raise DocumentError(f"{path}: holds no rank0.safetensors")
    layers: dict[int, np.ndarray] = {}
    iterations: set[int] = set()
    contents = []
    for file in files:
        loaded = read_safetensors(file)
        names = {name: re.fullmatch(r"([0-9]{1,15})_([0-9]{1,15})", name) for name in loaded}
        if len({match[2] for match in names.values() if match}) > MAX_LAYERS:
            raise DocumentError(f"{file}: more than {MAX_LAYERS} layers")
        tensors = {name: to_array(tensor, f"{file}: {name}", "iu") for name, tensor in loaded.items()}
        for name, counts in tensors.items():
            match = names[name]
            if not match:
                raise DocumentError(f"{file}: {show(name)}: expected {{iteration}}_{{layer}}")
            if counts.shape != (experts,):
                raise DocumentError(f"{file}: {name}: expected {experts} counts, got {list(counts.shape)}")
            iteration, layer = int(match[1]), int(match[2])
            iterations.add(iteration)
            layers[layer] = add_counts(layers.get(layer), counts, f"{file}: {name}")
        contents.append(tensors)
    if not layers:
        raise DocumentError(f"{path}: zero counts: TensorRT-LLM recorded no iteration")
    notes = [f"{len(iterations)} iterations of {len(files)} ranks summed"]
    first, *others = contents
    if others and all(_same(first, other) for other in others):
        notes.append("all ranks hold the same counts (tensor parallelism): each choice is counted once per rank")
    order = sorted(layers)
    model = options.model
    if model is not None and model.layers and any(layer >= model.layers for layer in order):
        extra = [layer for layer in order if layer >= model.layers]
        notes.append(
            f"layers {ranges(extra)} are beyond the {model.layers} of {model.name} (multi-token prediction): dropped"
        )
        order = [layer for layer in order if layer < model.layers]
    if not order:
        raise DocumentError(f"{path}: no layer below the {model.layers if model else 0} of the model")
    notes.append(f"layers are the model's {ranges(order)}")
    counts = np.stack([layers[layer] for layer in order])
    source = "TensorRT-LLM expert statistics"
    return counts_trace(counts, notes, options=options, where=str(path), source=source, layer_numbers=order), notes


def _same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)

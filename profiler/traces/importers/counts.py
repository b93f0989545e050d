"""Counts per expert that an engine or its user kept: fields of JSON, of a torch.save file, of arrays by name.

- SGLang: ``logical_count`` [layers, experts] or [steps, layers, experts], integers or floats. Its own
  --init-expert-location reads the same field. Source: sglang/srt/eplb/expert_location.py, 0.5.23.
- vLLM 0.33.0 keeps ``expert_load_pass`` [layers, physical experts] and ``expert_load_window`` [steps, layers, physical
  experts] in its EplbState and dumps none of them; scripts that do write these names beside
  ``physical_to_logical_map``, or ``per_layer_stats`` of a ``logical_load`` each, or ``global_expert_load_window``
  [layers, experts], already logical. Source: vllm/distributed/eplb/eplb_state.py.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ....spec.document import show
from ....spec.errors import DocumentError
from ....spec.model import MAX_EXPERTS
from .files import to_array
from .options import Options
from .records import add_counts

LOGICAL = ("logical_count", "logical_load", "global_expert_load_window", "last_expert_load", "expert_load")
PHYSICAL = ("expert_load_window", "expert_load_pass", "physical_load", "total_load")
MAPS = ("physical_to_logical_map", "last_physical_to_logical_map")
PER_LAYER = "per_layer_stats"


def holds_counts(body: Any) -> bool:
    """Whether a document has a field of counts."""
    return isinstance(body, Mapping) and any(name in body for name in (*LOGICAL, *PHYSICAL, PER_LAYER))


def read_counts(body: Mapping[str, Any], where: str, options: Options, notes: list[str]) -> np.ndarray:
    """Counts [layers, logical experts] as float64, steps summed, physical experts mapped back."""
    if PER_LAYER in body:
        body = _stacked(body, where)
    name = next(name for name in (*LOGICAL, *PHYSICAL) if name in body)
    counts, steps = summed(body[name], f"{where}: {name}")
    if steps is not None:
        notes.append(f"{name}: {steps} steps summed")
    return counts if name in LOGICAL else _logical(counts, body, f"{where}: {name}", options, notes)


def summed(value: Any, where: str) -> tuple[np.ndarray, int | None]:
    """Counts [layers, experts] as float64 of these or of [steps, layers, experts]; and the number of steps."""
    counts = to_array(value, where, "iuf")
    if counts.ndim not in (2, 3) or 0 in counts.shape or counts.shape[-1] > MAX_EXPERTS:
        raise DocumentError(
            f"{where}: expected integers or floats; expected [steps, layers, experts], got {counts.dtype} "
            f"{list(counts.shape)}"
        )
    if counts.ndim == 2:
        return add_counts(None, counts, where), None
    total: np.ndarray | None = None
    for step in counts:
        total = add_counts(total, step, where)
    assert total is not None
    return total, len(counts)


def map_back(counts: np.ndarray, logical: np.ndarray) -> np.ndarray:
    """Counts [L, P] of physical experts as [L, E] of logical ones."""
    found = np.zeros((len(logical), int(logical.max()) + 1))
    np.add.at(found, (np.arange(len(logical))[:, None], logical), counts)
    return found


def read_map(value: object, where: str) -> np.ndarray:
    """[L, P] logical expert of every physical one, checked."""
    logical = to_array(value, where, "iu")
    if logical.ndim != 2 or 0 in logical.shape:
        raise DocumentError(f"{where}: expected [layers, physical experts], got {list(logical.shape)}")
    if logical.min() < 0 or int(logical.max()) >= min(logical.shape[1], MAX_EXPERTS):
        raise DocumentError(
            f"{where}: expected experts in 0..{min(logical.shape[1], MAX_EXPERTS) - 1}, found "
            f"{int(logical.min())}..{int(logical.max())}"
        )
    return logical.astype(np.int32)


def _logical(counts: np.ndarray, body: Mapping[str, Any], where: str, options: Options, notes: list[str]) -> np.ndarray:
    name = next((name for name in MAPS if body.get(name) is not None), None)
    if name is not None:
        logical = read_map(body[name], f"{where.rsplit(': ', 1)[0]}: {name}")
        if logical.shape != counts.shape:
            raise DocumentError(f"{where}: {list(counts.shape)} beside {name} of {list(logical.shape)}")
        notes.append(
            "physical experts mapped back to logical ones by the recorded map: right only if the engine did not "
            "rebalance meanwhile"
        )
        return map_back(counts, logical)
    if options.num_experts != counts.shape[1]:
        raise DocumentError(
            f"{where}: counts of {counts.shape[1]} physical experts without {MAPS[0]}: keep that beside them; without "
            "redundant experts and rebalancing, give --num-experts"
        )
    notes.append(f"no {MAPS[0]}: physical experts taken for logical ones, right only if the engine never rebalanced")
    return counts


def _stacked(body: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Layers that stand one by one, as arrays."""
    layers = body[PER_LAYER]
    if not isinstance(layers, list) or not layers or not all(isinstance(layer, dict) for layer in layers):
        raise DocumentError(f"{where}: {PER_LAYER}: expected an object per layer, got {show(layers)}")
    name = next((name for name in ("logical_load", "physical_load") if all(name in layer for layer in layers)), None)
    if name is None:
        raise DocumentError(f"{where}: {PER_LAYER}: expected a logical_load or physical_load in every layer")
    numbers = [layer.get("layer", i) for i, layer in enumerate(layers)]
    if numbers != list(range(len(layers))):
        raise DocumentError(f"{where}: {PER_LAYER}: expected layers 0..{len(layers) - 1} in order")
    return {name: [layer[name] for layer in layers], **{key: body[key] for key in MAPS if key in body}}

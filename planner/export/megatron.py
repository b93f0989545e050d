"""Megatron-Core: flags, and a permutation of the checkpoint's experts.

Megatron-Core has no input for a placement: of N ranks, rank r holds the r-th of N contiguous blocks of experts. So the
experts are renumbered instead: in every layer, position n takes the expert ``order[n]``, its matrices and its router
row (and router biases) alike. The layer then computes the same, and the contiguous blocks are the placement.

``permute`` does that to one array. Expert numbers in the permuted checkpoint's own traces are the new ones.
Source: transformer/moe/moe_layer.py (``local_expert_indices``).
"""

from typing import ClassVar

import numpy as np
from pydantic import PositiveInt

from ...spec.document import Document, show
from ...spec.errors import DocumentError, MoeplanError
from ...spec.model import Model
from ...spec.placement import Placement
from .common import Engine, Export, PathOf, Slots, Target, check_row, slots_of

FLAGS = "megatron-flags.txt"
PERMUTATION = "expert-permutation.json"
DISPATCHERS = ("allgather", "alltoall", "flex")


class ExpertPermutation(Document):
    """Where the experts go: for each layer with experts (absolute index), the old expert at each new position."""

    kind: ClassVar[str] = "moeplan.expert_permutation"

    model: str
    num_experts: PositiveInt
    expert_model_parallel_size: PositiveInt
    layers: dict[str, list[int]]

    @classmethod
    def hint(cls) -> str:
        return "; make one with `moeplan export place.json --to megatron`"


def permute(array: np.ndarray, order: list[int]) -> np.ndarray:
    """[experts, ...] with the old rows ``order`` in their new places.

    For stacked expert matrices, router rows [experts, hidden] and router biases [experts]. Rows after the last expert
    (those of LongCat-Flash's identity experts in its router) stay where they are.
    """
    if sorted(order) != list(range(len(order))) or len(array) < len(order):
        raise ValueError(f"order must hold each of 0..{len(order) - 1} once, and the array a row for each")
    return np.concatenate([array[order], array[len(order) :]])


def write(placement: Placement, target: Target, path_of: PathOf) -> Export:
    if not placement.single_copy:
        slots = sum(len(experts) for experts in placement.layers[0].slots)
        raise MoeplanError(
            f"the placement has {slots} slots for {target.experts} experts: Megatron-Core holds every expert once; "
            "make a placement with as many slots as experts"
        )
    # On a rank the order is free: ascending keeps the groups of a group-limited router together.
    rows = [[expert for experts in layer.slots for expert in sorted(experts)] for layer in placement.layers]
    for index, row in zip(target.moe_layers, rows, strict=True):
        _check_groups(row, target.model, target.model.moe_layers[target.moe_layers.index(index)])
    permutation = ExpertPermutation(
        model=target.model.name,
        num_experts=target.experts,
        expert_model_parallel_size=target.ranks,
        layers={str(index): row for index, row in zip(target.moe_layers, rows, strict=True)},
    )
    flags = ["--expert-model-parallel-size", str(target.ranks), "--expert-tensor-parallel-size", "1"]
    flags += ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
    flags += ["--moe-token-dispatcher-type", "alltoall"]
    files = {FLAGS: "\n".join(flags) + "\n", PERMUTATION: permutation.to_json()}
    notes = [
        f"apply {PERMUTATION} to the checkpoint first (moeplan.planner.export.megatron.permute): without it "
        "Megatron-Core runs the linear placement",
        "a placement says nothing of tensor or pipeline parallelism: both are 1; change the flags at will",
    ]
    return Export(ENGINE.name, ENGINE.version, files, flags, notes)


def read(text: str, where: str, target: Target) -> Slots | None:
    if text.lstrip().startswith("-"):
        _check_flags(text.splitlines(), where, target)
        return None
    found = ExpertPermutation.parse(text, where)
    for name, got, expected in (
        ("num_experts", found.num_experts, target.experts),
        ("expert_model_parallel_size", found.expert_model_parallel_size, target.ranks),
    ):
        if got != expected:
            raise DocumentError(f"{where}: {name}: {got}, expected {expected}")
    keys = [str(index) for index in target.moe_layers]
    if set(found.layers) != set(keys):
        wrong = min(set(found.layers) ^ set(keys))
        state = "missing" if wrong in keys else f"no layer of {target.model.name!r} with experts"
        raise DocumentError(f"{where}: layers: layer {show(wrong)}: {state}")
    for key, row in found.layers.items():
        check_row(row, target, f"{where}: layers[{key}]")
        if len(row) != target.experts:
            raise DocumentError(f"{where}: layers[{key}]: {len(row)} positions, expected each expert once")
    return slots_of([found.layers[key] for key in keys], target.ranks)


def _check_groups(row: list[int], model: Model, layer: int) -> None:
    """A group-limited router takes contiguous experts for a group: a group must stay one, in whatever order."""
    moe = model.layers[layer].moe
    assert moe is not None
    size = moe.num_experts // moe.gate.groups
    for start in range(0, moe.num_experts, size):
        mixed = {expert // size for expert in row[start : start + size]}
        if len(mixed) > 1:
            raise MoeplanError(
                f"layer {layer}: positions {start}..{start + size - 1} would mix router groups {sorted(mixed)[:4]}; "
                f"{model.name!r} routes by {moe.gate.groups} groups of {size} contiguous experts, which a permutation "
                "must keep whole: use the linear placement, or an engine that maps slots (sglang, tensorrt-llm)"
            )


def _check_flags(lines: list[str], where: str, target: Target) -> None:
    """One argument per line; only the flags that ``write`` uses."""
    if len(lines) % 2:
        raise DocumentError(f"{where}: {len(lines)} lines, expected a flag and its value in turn")
    flags = dict(zip(lines[::2], lines[1::2], strict=True))
    sizes = [f"--{kind}-parallel-size" for kind in ("expert-model", "expert-tensor", "tensor-model", "pipeline-model")]
    wrong = set(flags) ^ {*sizes, "--moe-token-dispatcher-type"}
    if wrong:
        state = "missing" if min(wrong) not in flags else "not a flag of a placement"
        raise DocumentError(f"{where}: {show(min(wrong))}: {state}")
    for name in sizes:
        if not (flags[name].isascii() and flags[name].isdigit() and int(flags[name][:9]) > 0):
            raise DocumentError(f"{where}: {name}: {show(flags[name])}, expected a whole number of ranks")
    if flags[sizes[0]] != str(target.ranks):
        raise DocumentError(f"{where}: {sizes[0]}: {flags[sizes[0]]}, expected {target.ranks}")
    if flags["--moe-token-dispatcher-type"] not in DISPATCHERS:
        kind = show(flags["--moe-token-dispatcher-type"])
        raise DocumentError(f"{where}: --moe-token-dispatcher-type: {kind}, expected one of {', '.join(DISPATCHERS)}")


ENGINE = Engine("megatron", "Megatron-Core", "0.19.2", (PERMUTATION, FLAGS), write, read)

"""vLLM: the merged flags, and the three proposals to load a placement, marked experimental.

What is merged takes no placement: ``--expert-placement-strategy linear|round_robin``, or ``--enable-eplb``, with which
vLLM finds its own, for model classes that are MixtureOfExperts. A placement that is linear or round robin in every
layer is carried by the flags in full, round robin only where the model routes by groups and attention is not data
parallel (determine_expert_placement_strategy falls back to linear). The proposals (none was merged when this was
written):

- pull request 41141, one JSON line, layers counted over those with experts: ``{"record_type": "eplb_initial_mapping",
  "version": 1, "num_redundant_experts": 2, "num_slots": 6, "initial_global_assignments": {"0": [0, 1, 2, 3, 0, 1]}}``
- pull request 49572, bare JSON: ``[[0, 1, 2, 3, 0, 1], ...]``, or one list for all layers
- pull request 34811: ``{"expert_to_ep_rank": [0, 0, 1, 1]}``, one map for all layers, without copies
"""

import json
from collections.abc import Callable
from typing import Literal

import numpy as np

from ...spec.document import Part, parse_object, show
from ...spec.errors import DocumentError
from ...spec.placement import Placement
from .common import (
    Engine,
    Export,
    PathOf,
    Slots,
    Target,
    check_length,
    check_row,
    parse_as,
    planned_slots,
    rows_of,
    same,
    slots_of,
)
from .degrees import attention_degree, fits, why_not
from .families import cell_of

FLAGS = "vllm-flags.txt"
MAPPING = "experimental-initial-mapping.jsonl"
MAP = "experimental-initial-expert-map.json"
RANKS = "experimental-expert-to-ep-rank.json"


class _Mapping(Part):
    record_type: Literal["eplb_initial_mapping"]
    version: Literal[1]
    num_redundant_experts: int
    num_slots: int
    initial_global_assignments: dict[str, list[int]]


class _ToRank(Part):
    expert_to_ep_rank: list[int]


class _Eplb(Part):
    window_size: int
    step_interval: int
    num_redundant_experts: int
    policy: Literal["default"]


def write(placement: Placement, target: Target, path_of: PathOf) -> Export:
    rows = rows_of(placement)
    redundant = len(rows[0]) - target.experts
    planned = planned_slots(placement)
    strategy = next((name for name, slots in _STRATEGIES.items() if same(slots(target), planned)), None)
    flags, degree, notes = degree_flags(target)
    lost = None
    if strategy == "round_robin" and (degree < target.ranks or _groups(target) < 2):
        strategy, lost = None, "it is round robin, which vLLM runs for models with expert groups and one group of ranks"
    if strategy:
        notes += [f"the placement is {strategy}: vLLM's flags carry it in full"]
        flags += ["--expert-placement-strategy", strategy]
    elif cell_of(ENGINE.name, target.model).use == "note":
        notes += [f"dropped by {FLAGS}: the whole placement and all copies; vLLM runs experts in order, once each"]
        flags += ["--expert-placement-strategy", "linear"]
    else:
        eplb = _Eplb(window_size=1000, step_interval=3000, num_redundant_experts=redundant, policy="default")
        flags += ["--enable-eplb", "--eplb-config", json.dumps(eplb.model_dump(), separators=(",", ":"))]
        notes += [
            f"dropped by {FLAGS}: the placement itself; vLLM loads none, and balances by load as it serves, "
            "blind to affinity and hosts"
        ]
    if lost:
        notes.append(lost)
    mapping = _Mapping(
        record_type="eplb_initial_mapping",
        version=1,
        num_redundant_experts=redundant,
        num_slots=len(rows[0]),
        initial_global_assignments={str(i): row for i, row in enumerate(rows)},
    )
    files = {
        FLAGS: "\n".join(flags) + "\n",
        MAPPING: json.dumps(mapping.model_dump()) + "\n",
        MAP: "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n",
    }
    notes.append(
        f"{MAPPING} and {MAP} are of open proposals (pull requests 41141 and 49572), unmerged when this was written"
    )
    ranks = [set(experts) for experts in placement.layers[0].slots]
    if placement.single_copy and all([set(e) for e in layer.slots] == ranks for layer in placement.layers):
        owner = {expert: rank for rank, experts in enumerate(ranks) for expert in experts}
        files[RANKS] = json.dumps({"expert_to_ep_rank": [owner[e] for e in range(target.experts)]}) + "\n"
        notes.append(
            f"{RANKS} is of an open proposal (pull request 34811); it keeps the ranks, not the order on a rank"
        )
    else:
        notes.append(f"no {RANKS}: that proposal has one map for all layers, without copies")
    return Export(ENGINE.name, ENGINE.version, files, flags, notes)


def degree_flags(target: Target) -> tuple[list[str], int, list[str]]:
    """Flags of the degrees with which vLLM starts the model, that of tensor parallelism, and what to say of it.

    The ranks of expert parallelism are those of tensor times data parallelism, the tensor-parallel rank fastest.
    Source: config/model.py verify_with_parallel_config; distributed/utils.py divide.
    """
    degree = attention_degree(target, matrices=True)
    flags = ["--tensor-parallel-size", str(degree)]
    notes = []
    if degree < target.ranks:
        flags += ["--data-parallel-size", str(target.ranks // degree)]
        notes.append(
            f"{why_not(target)} do not divide between {target.ranks} ranks: attention runs data parallel, "
            f"{target.ranks // degree} groups of {degree}"
        )
    return [*flags, "--enable-expert-parallel"], degree, notes


def _groups(target: Target) -> int:
    moe = target.model.moe_block().moe
    assert moe is not None
    return moe.gate.groups


def read(text: str, where: str, target: Target) -> Slots | None:
    """Any of the four files, told apart by how it starts."""
    start = text.lstrip()[:1]
    if start == "-":
        return _read_flags(text.splitlines(), where, target)
    if start == "[":
        return _read_map(text, where, target)
    body = parse_object(text, where)
    return _read_ranks(text, where, target) if "expert_to_ep_rank" in body else _read_mapping(text, where, target)


def _read_flags(lines: list[str], where: str, target: Target) -> Slots | None:
    """One argument per line; only the flags that ``write`` uses."""
    found: dict[str, str | None] = {}
    arguments = iter(lines)
    for flag in arguments:
        if flag in _VALUED:
            found[flag] = next(arguments, "")
        elif flag in _SWITCHES:
            found[flag] = None
        else:
            raise DocumentError(f"{where}: {show(flag)}: expected one of {', '.join((*_SWITCHES, *_VALUED))}")
    if "--enable-expert-parallel" not in found:
        raise DocumentError(f"{where}: --enable-expert-parallel is missing: without it every rank holds every expert")
    _check_degrees(found, where, target)
    degree = int(found["--tensor-parallel-size"] or 0)
    if "--enable-eplb" in found:
        redundant = parse_as(_Eplb, found.get("--eplb-config") or "", f"{where}: --eplb-config").num_redundant_experts
        if redundant < 0 or (target.experts + redundant) % target.ranks:
            raise DocumentError(
                f"{where}: --eplb-config: num_redundant_experts: {redundant}; with {target.experts} experts that does "
                f"not divide between {target.ranks} ranks"
            )
        _check_divides(degree, where, target)
        return None
    strategy = found.get("--expert-placement-strategy")
    if strategy is None or strategy not in _STRATEGIES:
        raise DocumentError(
            f"{where}: --expert-placement-strategy: {show(strategy)}, expected {' or '.join(_STRATEGIES)}"
        )
    _check_divides(degree, where, target)
    return _STRATEGIES[strategy](target)


def _check_degrees(found: dict[str, str | None], where: str, target: Target) -> None:
    """Tensor times data parallelism are the ranks."""
    tensor, data = found.get("--tensor-parallel-size"), found.get("--data-parallel-size", "1")
    for name, value in (("--tensor-parallel-size", tensor), ("--data-parallel-size", data)):
        if value is None or not (value.isascii() and value.isdigit() and 0 < int(value[:9]) <= target.ranks):
            expected = target.ranks if "--data-parallel-size" not in found else f"1..{target.ranks}"
            raise DocumentError(f"{where}: {name}: {show(value)}, expected {expected}")
    assert tensor is not None
    assert data is not None
    if int(tensor[:9]) * int(data[:9]) != target.ranks:
        times = f" x --data-parallel-size {data}" if "--data-parallel-size" in found else ""
        raise DocumentError(f"{where}: --tensor-parallel-size: {show(tensor)}{times}, expected {target.ranks} ranks")


def _check_divides(degree: int, where: str, target: Target) -> None:
    if not fits(target.model, degree, matrices=True):
        raise DocumentError(
            f"{where}: --tensor-parallel-size: {degree} does not divide {why_not(target)} of {target.model.name!r}, "
            f"so vLLM does not start; {attention_degree(target, matrices=True)} is the largest on {target.ranks} ranks"
        )


def _read_mapping(text: str, where: str, target: Target) -> Slots:
    mapping = parse_as(_Mapping, text, where)
    expected = {str(i): i for i in range(len(target.moe_layers))}
    field = f"{where}: initial_global_assignments"
    if set(mapping.initial_global_assignments) != set(expected):
        wrong = min(set(mapping.initial_global_assignments) ^ set(expected))
        state = "missing" if wrong in expected else f"expected 0..{len(expected) - 1}"
        raise DocumentError(f"{field}: layer {show(wrong)}: {state}")
    if mapping.num_redundant_experts != mapping.num_slots - target.experts:
        raise DocumentError(
            f"{where}: num_redundant_experts: {mapping.num_redundant_experts}, expected {mapping.num_slots} slots - "
            f"{target.experts} experts"
        )
    rows = [mapping.initial_global_assignments[key] for key in expected]
    return _checked(rows, mapping.num_slots, field, target)


def _read_map(text: str, where: str, target: Target) -> Slots:
    found = parse_as(list, text, where)
    if found and isinstance(found[0], list):
        rows = parse_as(list[list[int]], text, where)
    else:
        rows = [parse_as(list[int], text, where)] * len(target.moe_layers)
    if len(rows) != len(target.moe_layers):
        raise DocumentError(
            f"{where}: {len(rows)} rows, model {target.model.name!r} has {len(target.moe_layers)} layers with experts"
        )
    return _checked(rows, len(rows[0]), f"{where}: rows", target)


def _checked(rows: list[list[int]], length: int, field: str, target: Target) -> Slots:
    for i, row in enumerate(rows):
        check_length(row, length, f"{field}[{i}]")
        check_row(row, target, f"{field}[{i}]")
    return slots_of(rows, target.ranks)


def _read_ranks(text: str, where: str, target: Target) -> Slots:
    owner = parse_as(_ToRank, text, where).expert_to_ep_rank
    field = f"{where}: expert_to_ep_rank"
    if len(owner) != target.experts:
        raise DocumentError(f"{field}: {len(owner)} entries, expected one for each of {target.experts} experts")
    held: list[list[int]] = [[] for _ in range(target.ranks)]
    for expert, rank in enumerate(owner):
        if not 0 <= rank < target.ranks:
            raise DocumentError(f"{field}[{expert}]: rank {rank}, expected 0..{target.ranks - 1}")
        held[rank].append(expert)
    for rank, experts in enumerate(held):
        if len(experts) * target.ranks != target.experts:
            raise DocumentError(f"{field}: rank {rank} has {len(experts)} of {target.experts} experts: unequal parts")
    return (tuple(tuple(experts) for experts in held),) * len(target.moe_layers)


def _linear(target: Target) -> Slots:
    """Contiguous experts; where they do not divide, the first ranks hold one more (determine_expert_map)."""
    held = tuple(tuple(map(int, part)) for part in np.array_split(np.arange(target.experts), target.ranks))
    return (held,) * len(target.moe_layers)


def _round_robin(target: Target) -> Slots:
    held = tuple(tuple(range(rank, target.experts, target.ranks)) for rank in range(target.ranks))
    return (held,) * len(target.moe_layers)


_STRATEGIES: dict[str, Callable[[Target], Slots]] = {"linear": _linear, "round_robin": _round_robin}
_SWITCHES = ("--enable-expert-parallel", "--enable-eplb")
_VALUED = ("--tensor-parallel-size", "--data-parallel-size", "--expert-placement-strategy", "--eplb-config")
ENGINE = Engine("vllm", "vLLM", "0.33.0", (FLAGS, MAPPING, MAP), write, read)

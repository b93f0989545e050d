"""vllm-ascend: an expert map, named by ``--additional-config '{"eplb_config": {"expert_map_path": FILE.json}}'``.

    {"moe_layer_count": 1, "layer_list": [{"layer_id": 0, "device_count": 2, "device_list": [
     {"device_id": 0, "device_expert": [7, 2, 0, 3, 5]}, {"device_id": 1, "device_expert": [6, 1, 4, 7, 2]}]}]}

Layers are counted over those with experts, and read by position, as are devices; every list has the same length; no
device holds an expert twice. Source: eplb/core/eplb_utils.py and ascend_config.py.

A rank sends an expert's tokens to one copy, always the same (``generate_log2phy_map``): the copy number
(tensor-parallel rank + data-parallel rank + expert) mod copies, whichever rank holds it.
"""

import json

from ...spec.document import Part
from ...spec.errors import DocumentError
from ...spec.placement import Placement
from .common import Engine, Export, PathOf, Slots, Target, check_length, check_row, parse_as, planned_slots, rows_of
from .vllm import degree_flags

FILE = "vllm-ascend-expert-map.json"


class _Device(Part):
    device_id: int
    device_expert: list[int]


class _Layer(Part):
    layer_id: int
    device_count: int
    device_list: list[_Device]


class _Map(Part):
    moe_layer_count: int
    layer_list: list[_Layer]


def write(placement: Placement, target: Target, path_of: PathOf) -> Export:
    layers = [
        _Layer(
            layer_id=i,
            device_count=target.ranks,
            device_list=[_Device(device_id=d, device_expert=list(e)) for d, e in enumerate(layer.slots)],
        )
        for i, layer in enumerate(placement.layers)
    ]
    body = ",\n".join(json.dumps(layer.model_dump()) for layer in layers)
    text = f'{{"moe_layer_count": {len(layers)}, "layer_list": [\n{body}\n]}}\n'
    redundant = len(rows_of(placement)[0]) - target.experts
    config: dict[str, object] = {"expert_map_path": path_of(FILE)}
    notes = [
        "expert_map_path is read by model runner V1 only: leave VLLM_USE_V2_MODEL_RUNNER off, V2 silently "
        "ignores the map",
        "leave dynamic_eplb off: it would replace the placement",
    ]
    command, degree, why = degree_flags(target)
    if redundant:
        config["num_redundant_experts"] = redundant
        own, held = own_copies(planned_slots(placement), degree)
        notes.append(
            "each rank sends an expert's tokens to one copy, by (tensor-parallel rank + data-parallel rank + expert) "
            f"mod copies: often not its own, here its own in {own} of {held} cases where it holds one"
        )
    command += ["--additional-config", json.dumps({"eplb_config": config})]
    notes += why
    return Export(ENGINE.name, ENGINE.version, {FILE: text}, command, notes)


def own_copies(slots: Slots, degree: int) -> tuple[int, int]:
    """In how many of all cases a rank that holds a copy of an expert with several uses its own; and all cases.

    degree: of tensor parallelism, which numbers the ranks that pick a copy.
    """
    own = held = 0
    for layer in slots:
        holders: dict[int, list[int]] = {}
        for rank, experts in enumerate(layer):
            for expert in experts:
                holders.setdefault(expert, []).append(rank)
        for expert, ranks in holders.items():
            for rank in ranks if len(ranks) > 1 else ():
                own += ranks[copy_of(expert, rank, len(ranks), degree)] == rank
                held += 1
    return own, held


def copy_of(expert: int, rank: int, copies: int, degree: int) -> int:
    """The copy, counted by rank, to which this rank sends the expert's tokens."""
    return (rank % degree + rank // degree + expert if degree > 1 else rank) % copies


def read(text: str, where: str, target: Target) -> Slots:
    found = parse_as(_Map, text, where)
    for name, count in (("moe_layer_count", found.moe_layer_count), ("layer_list", len(found.layer_list))):
        if count != len(target.moe_layers):
            raise DocumentError(
                f"{where}: {name}: {count} layers, "
                f"model {target.model.name!r} has {len(target.moe_layers)} with experts"
            )
    length = len(found.layer_list[0].device_list[0].device_expert) if found.layer_list[0].device_list else 0
    slots = []
    for i, layer in enumerate(found.layer_list):
        field = f"{where}: layer_list[{i}]"
        if layer.layer_id != i:
            raise DocumentError(f"{field}.layer_id: {layer.layer_id}, expected {i}: layers are read by position")
        for name, count in (("device_count", layer.device_count), ("device_list", len(layer.device_list))):
            if count != target.ranks:
                raise DocumentError(f"{field}.{name}: {count} devices, expected {target.ranks}")
        for d, device in enumerate(layer.device_list):
            here = f"{field}.device_list[{d}]"
            if device.device_id != d:
                raise DocumentError(f"{here}.device_id: {device.device_id}, expected {d}: devices are read by position")
            check_length(device.device_expert, length, f"{here}.device_expert")
            if len(set(device.device_expert)) < len(device.device_expert):
                raise DocumentError(f"{here}.device_expert: a device may not hold an expert twice")
        check_row([expert for device in layer.device_list for expert in device.device_expert], target, field)
        slots.append(tuple(tuple(device.device_expert) for device in layer.device_list))
    return tuple(slots)


ENGINE = Engine("vllm-ascend", "vllm-ascend", "0.23.0.post1", (FILE,), write, read)

"""SGLang: ``--init-expert-location FILE.json``.

    {"physical_to_logical_map": [[0, 1, 2, 3, 0, 1], ...]}

One row per hidden layer, dense ones too (their rows are read and unused); the slots of a row divide evenly between the
ranks, slot s belonging to rank s // (slots / ranks). The loader passes the object on as keyword arguments: any other
key is refused. Source: srt/eplb/expert_location.py.
"""

import json

from ...spec.document import Part
from ...spec.errors import DocumentError
from ...spec.placement import Placement
from .common import Engine, Export, PathOf, Slots, Target, check_length, check_row, parse_as, rows_of, slots_of

FILE = "sglang-expert-location.json"


class _Location(Part):
    physical_to_logical_map: list[list[int]]


def write(placement: Placement, target: Target, path_of: PathOf) -> Export:
    planned = rows_of(placement)
    slots = len(planned[0])
    # An unused row must still hold every expert: SGLang looks for a copy of each, in each layer.
    rows = [[slot % target.experts for slot in range(slots)] for _ in range(target.hidden_layers)]
    for index, row in zip(target.moe_layers, planned, strict=True):
        rows[index] = row
    text = '{"physical_to_logical_map": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n"
    command = ["--tp-size", str(target.ranks), "--ep-size", str(target.ranks), "--moe-a2a-backend", "deepep"]
    command += ["--init-expert-location", path_of(FILE)]
    notes = ["leave --enable-eplb off: it would replace the placement after its first window"]
    if slots > target.experts:
        command += ["--ep-num-redundant-experts", str(slots - target.experts)]
        command += ["--ep-dispatch-algorithm", "static"]
        notes += [
            "a rank uses the copy on its own device, then on its own host, before any other: copies are not chosen by "
            "planned shares; without an all-to-all backend use `--ep-dispatch-algorithm dynamic`, static is refused"
        ]
    dense = target.hidden_layers - len(target.moe_layers)
    if dense:
        notes.append(f"{dense} dense layers have rows that mean nothing: SGLang asks for a row per layer")
    return Export(ENGINE.name, ENGINE.version, {FILE: text}, command, notes)


def read(text: str, where: str, target: Target) -> Slots:
    rows = parse_as(_Location, text, where).physical_to_logical_map
    field = f"{where}: physical_to_logical_map"
    if len(rows) != target.hidden_layers:
        raise DocumentError(
            f"{field}: {len(rows)} rows, expected {target.hidden_layers}, one per layer of {target.model.name!r} "
            f"({target.hidden_layers - len(target.moe_layers)} dense ones among them)"
        )
    for index, row in enumerate(rows):
        check_length(row, len(rows[0]), f"{field}[{index}]")
        check_row(row, target, f"{field}[{index}]")
    return slots_of([rows[index] for index in target.moe_layers], target.ranks)


ENGINE = Engine("sglang", "SGLang", "0.5.23", write, read)

"""SGLang: ``--init-expert-location FILE.json``.

    {"physical_to_logical_map": [[0, 1, 2, 3, 0, 1], ...]}

One row per hidden layer, dense ones too (their rows are read and unused); the slots of a row divide evenly between the
ranks, slot s belonging to rank s // (slots / ranks). The loader passes the object on as keyword arguments: any other
key is refused. Source: srt/eplb/expert_location.py; the flags: srt/arg_groups (parallel_hook.py, validation_hook.py).
"""

import json

from ...spec.document import Part
from ...spec.errors import DocumentError, MoeplanError
from ...spec.placement import Placement
from .common import (
    Engine,
    Export,
    PathOf,
    Slots,
    Target,
    check_length,
    check_row,
    hosts_of,
    parse_as,
    rows_of,
    slots_of,
)
from .degrees import attention_degree, undivided, why_not

FILE = "sglang-expert-location.json"
MASTER = "HOST:PORT"  # of the first host, which only the user knows


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
    command, notes = _degrees(target)
    hosts = hosts_of(placement, "SGLang")
    if hosts > 1:
        command += ["--nnodes", str(hosts), "--node-rank", "0", "--dist-init-addr", MASTER]
        notes.append(
            f"on each of the {hosts} hosts: --node-rank 0 to {hosts - 1} in the order of the placement, the same "
            f"--dist-init-addr; without --nnodes SGLang takes all ranks for one host's when it prefers copies there"
        )
    command += ["--init-expert-location", path_of(FILE)]
    notes.append("leave --enable-eplb off: it would replace the placement after its first window")
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


def _degrees(target: Target) -> tuple[list[str], list[str]]:
    """Flags of the parallel degrees with which SGLang starts, and what to say of them."""
    ranks, notes = target.ranks, []
    if ranks > target.experts:
        raise MoeplanError(
            f"{ranks} ranks for {target.experts} experts: SGLang refuses a tensor-parallel size above the number of "
            "experts; place on fewer devices"
        )
    flags = ["--tp-size", str(ranks), "--ep-size", str(ranks)]
    attention = attention_degree(target, matrices=False)
    if attention < ranks:
        flags += ["--attn-dp-size", str(ranks // attention)]
        notes.append(
            f"{why_not(target)} do not divide between {ranks} ranks: attention runs data parallel, "
            f"{ranks // attention} groups of {attention}"
        )
    size = undivided(target)
    if size and target.model.family.startswith("deepseek"):
        flags += ["--moe-dense-tp-size", "1"]
        notes.append(f"{ranks} ranks do not divide dense FFNs of {size}: every rank computes them in full")
    elif size and target.model.family.startswith("qwen"):
        raise MoeplanError(
            f"model {target.model.name!r}: SGLang divides a dense FFN of {size} between the ranks, {ranks} do not "
            "divide it: place on another number of devices"
        )
    return [*flags, "--moe-a2a-backend", "deepep"], notes


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


ENGINE = Engine("sglang", "SGLang", "0.5.23", (FILE,), write, read)

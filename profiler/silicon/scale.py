"""Tables of GPUs that were not measured: another GPU's, scaled row by row by the two data sheets.

    seconds' = start + (seconds - start) * least' / least

``start`` is the shortest time of the row's type of numbers and kernel: launching a kernel costs the same on either GPU.
``least`` is the roofline of each GPU, so that a row may be bound by arithmetic on one and by memory on the other.
"""

import math
from collections.abc import Iterable

import numpy as np

from ...spec.errors import MoeplanError
from ...spec.tabled import Origin, System, Table
from .roofline import COUNTED, least_seconds

LINKS = ("all_reduce", "nccl", "oneccl")


def can_scale(operator: str) -> bool:
    """Whether the work of this operator is counted."""
    return operator in COUNTED


def scale_table(table: Table, source: System, target: System) -> Table:
    """The table as ``target`` would have it. Rows of types that it has no hardware for are left out.

    Raises MoeplanError where none is left.
    """
    # Which rank was timed under uneven routing is not known: the work of a mean one scales as well.
    frame = table.frame.assign(routing="balanced") if "routing" in table.frame else table.frame
    before, after = (least_seconds(frame, table.operator, system) for system in (source, target))
    known = np.isfinite(before) & np.isfinite(after) & (before > 0)
    if not known.any():
        raise MoeplanError(f"{table.operator} on {target.name}: it has no hardware for {' or '.join(_types(table))}")
    seconds = table.frame["seconds"]
    start = table.frame.groupby(["dtype", "kernel"])["seconds"].transform("min")
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = start + (seconds - start) * (after / before)
    labels = table.frame["source"] + f" on {source.name}"
    frame = table.frame.assign(seconds=scaled, source=labels, origin="scaled")[known].reset_index(drop=True)
    text = f"scaled from {source.name} by the two data sheets: {table.origin.text}"
    return Table(table.operator, target.name, table.engine, table.version, frame, Origin("scaled", text))


def nearest_systems(target: System, candidates: Iterable[System], operator: str) -> list[System]:
    """Most alike first: of the same maker and, where it computes, generation; then by the rates it depends on."""

    def distance(other: System) -> tuple[bool, bool, float, str]:
        maker = (target.generation == "other") != (other.generation == "other")
        if operator in LINKS:
            pairs = [
                (target.intra_node_bytes_per_second, other.intra_node_bytes_per_second),
                (target.inter_node_bytes_per_second, other.inter_node_bytes_per_second),
            ]
            return maker, False, sum(abs(math.log(a / b)) for a, b in pairs), other.name
        pairs = [
            (target.memory_bytes_per_second, other.memory_bytes_per_second),
            (target.flops.get("bfloat16", math.nan), other.flops.get("bfloat16", math.nan)),
        ]
        apart = sum(abs(math.log(a / b)) for a, b in pairs)
        other_generation = target.generation != other.generation
        return maker, other_generation, math.inf if math.isnan(apart) else apart, other.name

    return sorted(candidates, key=distance)


def _types(table: Table) -> list[str]:
    return sorted(table.frame["dtype"].unique())

"""Experts beyond the memory limit (MoNDE, arXiv 2405.18832): what stays in memory, and what is read when.

Every device stores the experts of its slots: those of ``resident`` in its memory, the others in a file of its own, from
which one reader at a time brings them into one of ``places`` in memory. The reader goes through the layers in order. In
each it reads, in their order, the experts of ``ahead``, from when it is known what the layer before needs; and, once it
is known what the layer itself needs, what is not there of that, what most tokens need first. What was to be read ahead
and is not needed is then read no more. For the first layer the reading ahead begins with the step. Where a plan has a
``foresight``, it takes the place of ``ahead`` behind the first layer (``spec.foresight``).

Where experts rest in a host's memory, beside a GPU, they may also be computed there by its processor (MoNDE): those
that are not to be read ahead and that at most ``host_rows`` rows of the batch need. Their rows are copied to the host,
and their outputs back.

What a layer needs is known as soon as its tokens are routed: devices tell each other with the numbers of rows that they
send. A layer with a shortcut (``spec.shortcut``) is routed early, so that its experts are read beside the backbone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pydantic import Field, NonNegativeInt

from .document import Part
from .foresight import Foresight

PAGE = 4096
"""Bytes: a direct read begins and ends at multiples of so many, in the file and in memory."""


class Offload(Part):
    """The slow tier of a plan."""

    folder: str = Field(
        description="on a disk of every host, where each rank has a file; empty for GPUs: in the host's memory"
    )
    places: tuple[NonNegativeInt, ...] = Field(
        description="experts that each device has space for beside those that stay"
    )
    foresight: Foresight | None = Field(
        None, description="what layers behind the first read ahead, by what the layer before needs; None: their lists"
    )


class Reads(Part):
    """Experts that a step brings into memory, all devices together."""

    needed: float = Field(description="by the step's tokens")
    listed: float = Field(0.0, description="to be read before it was known what is needed")
    ahead: float = Field(description="needed, and of those to be read before that was known")
    vain: float = Field(description="read besides, and not needed")
    host: float = Field(0.0, description="not brought into memory: computed by the host's processor where they rest")


def check_tiers(
    offloaded: bool,
    slots: tuple[tuple[int, ...], ...],
    resident: tuple[tuple[int, ...], ...] | None,
    ahead: tuple[tuple[int, ...], ...] | None,
    host_rows: tuple[int, ...] | None = None,
) -> None:
    """Raise ``ValueError`` where an ``offload`` layer does not say what is where, or another one does."""
    if host_rows is not None and not offloaded:
        raise ValueError("host_rows belong to strategy offload, and only there")
    if host_rows is not None and len(host_rows) != len(slots):
        raise ValueError("host_rows need one number for each device")
    if (resident is not None, ahead is not None) != (offloaded, offloaded):
        raise ValueError("resident and ahead belong to strategy offload, and only there")
    if resident is None or ahead is None:
        return
    if not len(resident) == len(ahead) == len(slots):
        raise ValueError("resident and ahead need one list for each device, as slots")
    for device, (held, stays, early) in enumerate(zip(slots, resident, ahead, strict=True)):
        for name, experts, of in (("resident", stays, set(held)), ("ahead", early, set(held) - set(stays))):
            if len(set(experts)) != len(experts) or not set(experts) <= of:
                what = "slots" if name == "resident" else "slots that are not resident"
                raise ValueError(f"{name}[{device}] must hold some of the device's {what}, each once")


class Cold(NamedTuple):
    """Places in ``slots`` of the experts outside memory that a device computes: those that it reads, and those that the
    host's processor computes, each in their order."""

    read: list[int]
    host: list[int]


def cold_experts(
    rows: np.ndarray, slots: Sequence[int], resident: Sequence[int], ahead: Sequence[int], host_rows: int = 0
) -> Cold:
    """What is to be read ahead, in that order, then what most tokens need first.

    rows: [slots] rows that each expert of the device computes. host_rows: of those that the host computes, at most.
    """
    stays = set(resident)
    cold = {expert: i for i, expert in enumerate(slots) if rows[i] and expert not in stays}
    early = [cold.pop(expert) for expert in ahead if expert in cold]
    late = sorted(cold.values(), key=lambda i: (-int(rows[i]), i))
    return Cold([*early, *(i for i in late if rows[i] > host_rows)], [i for i in late if rows[i] <= host_rows])


def padded(size: int) -> int:
    """Bytes that ``size`` bytes take in the file, and in a place in memory."""
    return -(-size // PAGE) * PAGE

"""What every engine's exporter shares: the ranks to fill, the notes on what is lost, the rules of a row of slots.

A row is what engines read: the expert in each physical slot of one layer, rank by rank, with equally many slots each.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from ...spec.document import describe
from ...spec.errors import DocumentError, MoeplanError
from ...spec.model import Model
from ...spec.placement import Placement

Slots = tuple[tuple[tuple[int, ...], ...], ...]  # [mixture-of-experts layers][ranks][slots]: experts
PathOf = Callable[[str], str]
T = TypeVar("T")

# The published models of these families predict several tokens with extra layers, which the catalogue leaves out.
MULTI_TOKEN = {"deepseek_v3", "longcat_flash"}


@dataclass(frozen=True)
class Target:
    """What an engine's file must fit: a model on so many ranks of expert parallelism."""

    model: Model
    ranks: int

    @cached_property
    def experts(self) -> int:
        moe = self.model.moe_block().moe
        assert moe is not None
        return moe.num_experts

    @cached_property
    def hidden_layers(self) -> int:
        """Layers as engines count them."""
        return len(self.model.layers) // self._blocks_per_layer

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Index of every layer with experts, as engines count them."""
        return tuple(index // self._blocks_per_layer for index in self.model.moe_layers)

    @property
    def _blocks_per_layer(self) -> int:
        # A layer of LongCat-Flash is two blocks of ours, with attention each, and one mixture of experts beside them.
        return 2 if self.model.family == "longcat_flash" else 1


@dataclass(frozen=True)
class Export:
    """An engine's files by name, the flags that start it with them, and everything that they do not carry, as text.

    beside: names of files without which the others have no effect.
    """

    engine: str
    version: str
    files: dict[str, str]
    command: list[str]
    notes: list[str] = field(default_factory=list)
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """One engine: its name on the command line and in text, the version whose sources were read, its two functions.

    ``files``: the files of which any can stand alone, the first of a kind first (``-o FILE`` picks by its ending).
    ``beside``: files that go with these, and never stand alone.
    ``write(placement, target, path_of)``: an Export; ``path_of`` gives the path at which the engine will find a file.
    ``read(text, where, target)``: the slots that a file of this engine asks for, None where it carries no placement;
    DocumentError names file, field, value and rule.
    """

    name: str
    title: str
    version: str
    files: tuple[str, ...]
    write: Callable[[Placement, Target, PathOf], Export]
    read: Callable[[str, str, Target], Slots | None]
    beside: tuple[str, ...] = ()


def check_fit(placement: Placement, target: Target, title: str) -> None:
    """Refuse a placement that is not one of this model, or that no engine can load; one line with both numbers."""
    model = target.model
    if not model.causal:
        raise MoeplanError(f"model {model.name!r}: {title} runs decoder-only language models, which this is not")
    if len(placement.layers) != len(model.moe_layers):
        raise MoeplanError(
            f"the placement has {len(placement.layers)} mixture-of-experts layers, "
            f"model {model.name!r} has {len(model.moe_layers)}: name the model that it was made for"
        )
    for index in model.moe_layers:
        moe = model.layers[index].moe
        assert moe is not None
        if moe.num_experts != placement.num_experts:
            raise MoeplanError(
                f"the placement has {placement.num_experts} experts, layer {index} of model {model.name!r} has "
                f"{moe.num_experts}: name the model that it was made for"
            )
    if target.ranks < 2:
        raise MoeplanError("the placement has 1 device: expert parallelism needs at least 2")
    check_equal_slots(placement, title)


def check_equal_slots(placement: Placement, title: str) -> None:
    """Engines divide the slots of a layer evenly between the ranks."""
    cure = f"{title} needs the same number on every rank: make a placement with `moeplan place --equal-slots`"
    counts = [[len(experts) for experts in layer.slots] for layer in placement.layers]
    for i, row in enumerate(counts):
        if len(set(row)) > 1:
            held = ", ".join(f"{row.count(n)} of {n}" for n in sorted(set(row)))
            raise MoeplanError(f"layers[{i}] has unequal slots (devices: {held} experts); {cure}")
        if row[0] != counts[0][0]:
            raise MoeplanError(f"layers[0] has {counts[0][0]} slots per device, layers[{i}] has {row[0]}; {cure}")


def planned_slots(placement: Placement) -> Slots:
    """What an exact export carries."""
    return tuple(layer.slots for layer in placement.layers)


def same(first: Slots, second: Slots) -> bool:
    """Whether the ranks hold the same experts, in any order on a rank."""
    return [[sorted(rank) for rank in layer] for layer in first] == [
        [sorted(rank) for rank in layer] for layer in second
    ]


def rows_of(placement: Placement) -> list[list[int]]:
    """[layers][slots] the expert in each physical slot, rank by rank."""
    return [[expert for experts in layer.slots for expert in experts] for layer in placement.layers]


def slots_of(rows: Sequence[Sequence[int]], ranks: int) -> Slots:
    """The inverse of ``rows_of``; rows divide evenly."""
    size = len(rows[0]) // ranks
    return tuple(tuple(tuple(row[r * size : (r + 1) * size]) for r in range(ranks)) for row in rows)


def linear_slots(target: Target) -> Slots:
    """Contiguous experts per rank, in every layer: what an engine without a placement does."""
    return slots_of([list(range(target.experts))] * len(target.moe_layers), target.ranks)


def check_row(row: Sequence[int], target: Target, where: str) -> None:
    """A row divides between the ranks and holds every expert; ``where`` names file and field."""
    for slot, expert in enumerate(row):
        if not 0 <= expert < target.experts:
            raise DocumentError(f"{where}[{slot}]: expert {expert}, expected 0..{target.experts - 1}")
    missing = sorted(set(range(target.experts)) - set(row))
    if missing:
        raise DocumentError(f"{where}: every expert needs a slot, {len(missing)} have none, first {missing[0]}")
    if len(row) % target.ranks:
        raise DocumentError(f"{where}: {len(row)} slots do not divide between {target.ranks} ranks")


def check_length(row: Sequence[int], expected: int, where: str) -> None:
    if len(row) != expected:
        raise DocumentError(f"{where}: {len(row)} slots, expected {expected}")


def parse_as(kind: type[T], body: Any, where: str) -> T:
    """A strictly typed value (a JSON text, or what a YAML text held); DocumentError names field, value and rule."""
    adapter = TypeAdapter(kind)
    try:
        if isinstance(body, str | bytes):
            return adapter.validate_json(body, strict=True)
        return adapter.validate_python(body, strict=True)
    except ValidationError as error:
        raise DocumentError(f"{where}: {describe(error)}") from None
    except (RecursionError, UnicodeError) as error:
        raise DocumentError(f"{where}: nested too deeply, or not text ({type(error).__name__})") from None


def common_notes(placement: Placement, target: Target, title: str, loads: np.ndarray | None) -> list[str]:
    """What no engine's file carries. ``loads``: [layers, experts] tokens, to say what even shares cost."""
    model, notes = target.model, [host_note(placement)]
    if placement.model and placement.model != model.name:
        notes.append(f"the placement says that it is of model {placement.model!r}; exported for {model.name!r}")
    if uneven_shares(placement):
        notes.append(share_note(placement, title, loads))
    if placement.movement == "coherent":
        notes.append(
            "the placement was fitted for tokens that stay where their expert is (coherent movement); "
            f"{title} sends every token back after each layer, so it gains less from affinity between layers"
        )
    if model.family in MULTI_TOKEN:
        notes.append("multi-token prediction (NextN) layers are not in the model: the engine places their experts")
    return notes


def host_note(placement: Placement) -> str:
    """Which ranks each host must run, and whether a launcher that fills host after host can do that."""
    hosts = [device.host for device in placement.devices]
    runs = [(host, list(ranks)) for host, ranks in groupby(range(len(hosts)), key=lambda rank: hosts[rank])]
    if len({host for host, _ in runs}) < len(runs):
        return (
            "warning: the devices of a host are not consecutive in the placement; ranks are its devices in order, "
            "so start them host by host with a rank file, or reorder the devices"
        )
    spans = ", ".join(f"{host}: {ranks[0]}-{ranks[-1]}" for host, ranks in runs[:8])
    more = f" and {len(runs) - 8} more" if len(runs) > 8 else ""
    return f"ranks are the devices of the placement in order: lay out the hosts so ({spans}{more})"


def hosts_of(placement: Placement, title: str) -> int:
    """How many hosts the ranks are on, where the engine starts equally many ranks on each; MoeplanError if it cannot.

    Devices that are not host by host are the note's business (``host_note``).
    """
    counts = Counter(device.host for device in placement.devices)
    if len(set(counts.values())) > 1:
        held = ", ".join(f"{host}: {count}" for host, count in list(counts.items())[:8])
        raise MoeplanError(
            f"the placement's hosts hold unequally many devices ({held}); {title} starts equally many ranks on each: "
            "place on equal hosts, or on one"
        )
    return len(counts)


def uneven_shares(placement: Placement) -> bool:
    """Whether a copy is meant to take another share than its expert's other copies."""
    for layer in placement.layers:
        planned = layer.share_matrix(placement.num_experts)
        held = held_by(layer.slots, placement.num_experts)
        if np.abs(planned - held / held.sum(axis=1, keepdims=True)).max() > 1e-6:
            return True
    return False


def held_by(slots: tuple[tuple[int, ...], ...], experts: int) -> np.ndarray:
    """[experts, ranks] whether the rank holds the expert."""
    held = np.zeros((experts, len(slots)), dtype=bool)
    for rank, row in enumerate(slots):
        held[list(row), rank] = True
    return held


def share_note(placement: Placement, title: str, loads: np.ndarray | None) -> str:
    dropped = f"dropped: the shares of the copies; {title} divides an expert's tokens between its copies by itself"
    if loads is None:
        return f"{dropped}, so the hottest device is hotter than planned (give the trace to see by how much)"
    planned, even = balances(placement, loads)
    return f"{dropped}; with even shares the balance is {even:.3f}, planned {planned:.3f} (1 is perfect)"


def balances(placement: Placement, loads: np.ndarray) -> tuple[float, float]:
    """Mean over layers of the hottest device's time over the ideal: with the planned shares, and with even ones.

    loads: [layers, experts] tokens. Raises MoeplanError if they are of another model.
    """
    if loads.shape != (len(placement.layers), placement.num_experts):
        raise MoeplanError(
            f"the trace has {loads.shape[0]} layers x {loads.shape[1]} experts, "
            f"the placement {len(placement.layers)} x {placement.num_experts}"
        )
    speed = np.array([device.speed for device in placement.devices])
    found = []
    for layer, load in zip(placement.layers, loads, strict=True):
        held = held_by(layer.slots, placement.num_experts)
        both = layer.share_matrix(placement.num_experts), held / held.sum(axis=1, keepdims=True)
        ideal = load.sum() / speed.sum()
        found.append([(load @ shares / speed).max() / ideal if ideal else 1.0 for shares in both])
    planned, even = np.mean(found, axis=0)
    return float(planned), float(even)

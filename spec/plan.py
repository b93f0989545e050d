"""Plan: what to do, what it will cost, and how sure we are."""

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from .chunk_order import Order, check_order
from .cluster import MAX_DEVICES, Bytes, CpuShare, Threads
from .document import Document, Part
from .load import Load
from .model import MAX_LAYERS, DType, Model
from .offload import Offload, check_tiers
from .placement import check_copies
from .prediction import (
    Candidate,
    Degrees,
    DeviceMemory,
    LayerPrediction,
    LinkTraffic,
    PlacementRecord,
    Prediction,
    ProbePoint,
    RoutingSource,
    SolverRecord,
)
from .shortcut import slots
from .workload import Workload

if TYPE_CHECKING:
    import pandas

__all__ = [
    "BESIDE",
    "CHUNKED",
    "IN_MEMORY",
    "MAX_CHUNKS",
    "STRATEGIES",
    "Candidate",
    "Degrees",
    "DeviceMemory",
    "LayerPlan",
    "LayerPrediction",
    "LinkTraffic",
    "PlacementRecord",
    "Plan",
    "PlanDevice",
    "Prediction",
    "ProbePoint",
    "RoutingSource",
    "SolverRecord",
    "Strategy",
]

Strategy = Literal["ep", "hierarchical", "sharded", "gathered", "coherent", "offload"]
STRATEGIES: tuple[Strategy, ...] = Strategy.__args__  # type: ignore[attr-defined]
IN_MEMORY: tuple[Strategy, ...] = tuple(known for known in STRATEGIES if known != "offload")
"""Strategies whose experts are all in the devices' memory."""
CHUNKED: tuple[Strategy, ...] = ("ep", "hierarchical", "sharded")
"""Strategies whose tokens may travel in several chunks."""
MAX_CHUNKS = 64
BESIDE: tuple[Strategy, ...] = ("ep", "offload")
"""Strategies of layers with a shortcut."""
Experts = tuple[tuple[int, ...], ...]
"""Of each device."""

SPELLED_OUT = 64
"""Devices up to which a document names those of every group."""
LISTS = ("slots", "shares", "speeds", "resident", "ahead", "host_rows")
"""Fields of a layer with one entry for each device."""


class PlanDevice(Part):
    """The device that a rank must find itself on."""

    host: str
    kind: Literal["cpu", "cuda"]
    name: str
    threads: Threads = 1
    cpu_share: CpuShare = 1.0
    memory_bytes: Bytes = Field(description="limit that the plan keeps")


class LayerPlan(Part):
    """One mixture-of-experts layer.

    ``slots`` holds, per device, the experts that it stores: ``ep``, ``hierarchical`` and ``coherent`` compute them
    there, ``gathered`` keeps them there at rest. ``shares`` holds, in the same form, the fraction of an expert's tokens
    that a copy takes. ``split`` (``sharded`` only) holds the FFN columns of every expert that each device stores.
    ``chunks``: every device's tokens in so many parts (``spec.layout.even``), of which one travels while another is
    computed, with ``hierarchical`` in an ``order`` of its own, if it has one (``spec.chunk_order``). ``slot`` (layers
    with a shortcut): which operator of ``spec.shortcut.WINDOWS`` the experts are computed before. ``speeds`` (``ep``
    only): shares are decided for every batch, for devices of these relative speeds (``spec.batch_shares``).
    ``resident``, ``ahead`` and ``host_rows`` (``offload`` only): see ``spec.offload``.
    """

    strategy: Strategy
    slots: Experts
    shares: tuple[tuple[float, ...], ...] | None = None
    split: tuple[int, ...] | None = None
    slot: int = Field(0, ge=0, description="of a shortcut layer: how many operators run before its experts")
    chunks: int = Field(1, ge=1, le=MAX_CHUNKS, description="parts in which tokens travel (ep, hierarchical, sharded)")
    order: Order | None = Field(None, description="hierarchical, in chunks: its calls; none: the usual order")
    speeds: tuple[PositiveFloat, ...] | None = Field(None, description="of each device: shares by batch (ep)")
    resident: Experts | None = Field(None, description="offload: of each device's slots, what stays in its memory")
    ahead: Experts | None = Field(None, description="offload: what each device reads before it is known to be needed")
    host_rows: tuple[NonNegativeInt, ...] | None = Field(
        None,
        description="offload: of each device, rows up to which an expert outside its memory is computed by the host",
    )
    repeats: int = Field(
        1,
        ge=1,
        le=MAX_DEVICES,
        description="in a document for many devices: slots and shares are those of the first of so many equal groups",
    )

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, body: Any) -> Any:
        """Groups that hold the same are written once, and spelled out in memory."""
        if not isinstance(body, dict):
            return body
        # What a validator has looked at is no JSON any more, and a list no tuple.
        body = body | {name: _tuples(body[name]) for name in (*LISTS, "split", "order") if name in body}
        times = body.get("repeats")
        if not isinstance(times, int) or isinstance(times, bool) or not 1 < times <= MAX_DEVICES:
            return body  # nothing to do, or what the field's own rule refuses
        long = {name: body[name] for name in LISTS if isinstance(body.get(name), tuple)}
        if any(len(lists) * times > MAX_DEVICES for lists in long.values()):
            raise ValueError(f"{times} groups have more than {MAX_DEVICES:,} devices")
        return body | {name: lists * times for name, lists in long.items()} | {"repeats": 1}

    @model_serializer(mode="wrap")
    def _shortened(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        body = handler(self)
        times = self._equal_groups() if len(self.slots) > SPELLED_OUT else 1
        if times > 1:
            each = len(self.slots) // times
            body |= {name: body[name][:each] for name in LISTS if body[name] is not None}
            body["repeats"] = times
        return body

    def _equal_groups(self) -> int:
        """The most groups of consecutive devices that hold the same; 1 where all hold something else."""
        devices = len(self.slots)
        for each in (n for n in range(1, devices // 2 + 1) if devices % n == 0):
            lists = [whole for whole in (getattr(self, name) for name in LISTS) if whole is not None]
            if all(whole[:each] * (devices // each) == whole for whole in lists):
                return devices // each
        return 1

    @model_validator(mode="after")
    def _consistent(self) -> "LayerPlan":
        check_copies(self.slots, self.shares)
        if any(expert < 0 for experts in self.slots for expert in experts):
            raise ValueError("slots hold a negative expert")
        if (self.strategy == "sharded") != (self.split is not None):
            raise ValueError("split belongs to strategy sharded, and only there")
        if self.chunks > 1 and self.strategy not in CHUNKED:
            raise ValueError(f"chunks belong to {', '.join(CHUNKED)}, not {self.strategy}")
        if self.order is not None and self.strategy != "hierarchical":
            raise ValueError(f"order belongs to strategy hierarchical, not {self.strategy}")
        if self.order is not None:
            check_order(self.order, self.chunks)
        if self.speeds is not None and self.strategy != "ep":
            raise ValueError(f"speeds belong to strategy ep, not {self.strategy}")
        if self.speeds is not None and (self.shares is not None or len(self.speeds) != len(self.slots)):
            raise ValueError("speeds need one number for each device, and no shares: they say how shares are decided")
        check_tiers(self.strategy == "offload", self.slots, self.resident, self.ahead, self.host_rows)
        if self.split is not None and min(self.split, default=0) < 0:
            raise ValueError("split holds a negative number of columns")
        return self

    @property
    def form(self) -> tuple[Strategy, int, Order | None, int, bool]:
        """Strategy, chunks and order, slot, shares by batch: what layers have in common that are predicted together."""
        return self.strategy, self.chunks, self.order, self.slot, self.speeds is not None

    @cached_property
    def number(self) -> int:
        """The hash, counted once: a search looks the same plans up again and again. Copies with another strategy,
        ``chunks``, ``order`` or ``slot`` keep it."""
        return hash((self.slots, self.shares, self.split, self.speeds, self.resident, self.ahead))

    def __hash__(self) -> int:
        return self.number

    def resting(self) -> list[list[int]]:
        """Experts that rest on each device where ``gathered`` keeps one copy: of several the first counts."""
        seen: set[int] = set()
        result = []
        for experts in self.slots:
            result.append([expert for expert in experts if expert not in seen])
            seen.update(experts)
        return result


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


class Plan(Document):
    """A decision, with its prediction and its proof."""

    kind: ClassVar[str] = "moeplan.plan"

    model: Model
    workload: Workload
    dtype: DType
    devices: tuple[PlanDevice, ...] = Field(min_length=1, max_length=MAX_DEVICES)
    lab: str | None = None
    degrees: Degrees
    sequences: tuple[int, ...] = Field(description="sequences of each data-parallel group")
    tokens: tuple[int, ...] = Field(description="tokens of the residual stream on each device")
    layers: tuple[LayerPlan, ...] = Field(max_length=MAX_LAYERS, description="one per mixture-of-experts layer")
    stored_layers: PositiveInt = Field(description="layers with storage of their own; fewer than all: storage repeats")
    offload: Offload | None = Field(None, description="where layers are offload: their files, and places in memory")
    routing: RoutingSource
    predicted: Prediction
    solver: SolverRecord
    placements: tuple[PlacementRecord, ...] = Field((), description="who placed the experts of ep and coherent layers")
    solve_seconds: float = Field(ge=0, description="recorded time, the one field that differs between equal solves")
    baselines: dict[str, float] = Field(description="predicted step seconds of what a user would do by hand")
    candidates: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()
    seed: int = 0
    digests: dict[str, str] = Field(description="of model, cluster and trace")
    probes: tuple[ProbePoint, ...] = ()
    profile_load: Load | None = Field(None, description="what others took of the processors during the profile")

    @model_validator(mode="after")
    def _consistent(self) -> "Plan":
        count = len(self.devices)
        if self.degrees.tensor * self.degrees.data != count:
            raise ValueError(f"tensor ({self.degrees.tensor}) * data ({self.degrees.data}) != devices ({count})")
        if len(self.tokens) != count or sum(self.tokens) != self.workload.tokens or min(self.tokens) < 0:
            raise ValueError(f"tokens must give {self.workload.tokens} tokens to {count} devices")
        if len(self.sequences) != self.degrees.data or sum(self.sequences) != self.workload.sequences:
            raise ValueError(f"sequences must give {self.workload.sequences} to {self.degrees.data} groups")
        for g, sequences in enumerate(self.sequences):
            held = sum(self.tokens[g * self.degrees.tensor : (g + 1) * self.degrees.tensor])
            if held != sequences * self.workload.length:
                raise ValueError(f"group {g} owns {sequences} sequences but holds {held} tokens")
        if len(self.layers) != len(self.model.moe_layers):
            raise ValueError(f"{len(self.layers)} layers for {len(self.model.moe_layers)} of the model")
        for block in self.model.blocks:
            a, tensor = block.attention, self.degrees.tensor
            if a is not None and (a.heads % tensor or a.kv_heads % tensor):
                raise ValueError(f"tensor ({tensor}) must divide heads ({a.heads}) and kv_heads ({a.kv_heads})")
        for i, layer in enumerate(self.layers):
            moe = self.model.moe_block(i).moe
            assert moe is not None
            block = self.model.moe_block(i)
            if layer.slot >= slots(block):
                last = f"0 to {slots(block) - 1}" if block.shortcut != "none" else "0: the layer has no shortcut"
                raise ValueError(f"layers[{i}].slot: {layer.slot}, expected {last}")
            if block.shortcut != "none" and layer.strategy not in BESIDE:
                raise ValueError(
                    f"layers[{i}].strategy: {layer.strategy}; layers with a shortcut run as {' or '.join(BESIDE)}"
                )
            if len(layer.slots) != count:
                raise ValueError(f"layers[{i}].slots: {len(layer.slots)} lists for {count} devices")
            if layer.split is not None and (len(layer.split) != count or sum(layer.split) != moe.ffn_size):
                raise ValueError(f"layers[{i}].split must divide {moe.ffn_size} columns over {count} devices")
            if layer.split is None and {e for held in layer.slots for e in held} != set(range(moe.num_experts)):
                raise ValueError(f"layers[{i}].slots must hold every expert 0..{moe.num_experts - 1}")
        self._check_coherent()
        self._check_offload()
        if len(self.predicted.memory) != count:
            raise ValueError(f"predicted.memory: {len(self.predicted.memory)} entries for {count} devices")
        if self.stored_layers > len(self.model.layers):
            raise ValueError(f"stored_layers ({self.stored_layers}) exceeds the layers ({len(self.model.layers)})")
        return self

    def _check_coherent(self) -> None:
        """Where ``coherent`` leaves a token, only ``coherent`` goes on, and finds the keys and values of one step."""
        strategies = {layer.strategy for layer in self.layers}
        if "coherent" not in strategies:
            return
        if others := sorted(strategies - {"coherent"}):
            raise ValueError(f"layers are coherent and {' and '.join(others)}: all must be coherent, or none")
        if self.workload.phase != "decode":
            raise ValueError("coherent layers need a decode workload: one new token of each sequence")
        if self.degrees.tensor > 1:
            raise ValueError(f"coherent layers need tensor 1, got {self.degrees.tensor}")
        if any(block.shortcut != "none" for block in self.model.blocks):
            raise ValueError(f"coherent layers need a model without shortcuts, which {self.model.name} is not")

    def _check_offload(self) -> None:
        """Experts are read in the order of the layers, so that all of them take part."""
        strategies = {layer.strategy for layer in self.layers}
        if ("offload" in strategies) != (self.offload is not None):
            raise ValueError("offload: belongs to plans with layers of strategy offload, and only there")
        if self.offload is None:
            return
        if others := sorted(strategies - {"offload"}):
            raise ValueError(f"layers are offload and {' and '.join(others)}: all must be offload, or none")
        if len(self.offload.places) != len(self.devices):
            raise ValueError(f"offload.places: {len(self.offload.places)} numbers for {len(self.devices)} devices")
        for device, places in enumerate(self.offload.places):
            if not places and any(
                set(layer.slots[device]) - set((layer.resident or ())[device]) for layer in self.layers
            ):
                raise ValueError(f"offload.places[{device}]: 0, but some of its experts rest on the disk")
            if (
                self.offload.folder
                and self.devices[device].kind == "cpu"
                and any(layer.host_rows and layer.host_rows[device] for layer in self.layers)
            ):
                raise ValueError(f"layers.host_rows[{device}]: its experts rest on a disk, where no host computes them")
        if self.stored_layers < len(self.model.layers):
            raise ValueError("offload plans store all layers: what memory does not hold rests on the disk")
        if self.offload.foresight is not None:
            tiers = [(layer.slots, layer.resident or (), layer.ahead or ()) for layer in self.layers]
            blocks = (self.model.moe_block(i) for i in range(len(tiers)))
            self.offload.foresight.check(tiers, [block.moe.num_experts for block in blocks if block.moe])

    def candidates_frame(self) -> "pandas.DataFrame":
        """Every searched alternative, fastest first; what does not fit comes last, with the reason.

        Columns: name, tensor, data, expert (degrees), layers of each strategy, step_seconds, reason.
        """
        import pandas as pd  # takes half a second, and few ask for it

        rows = [
            {
                "name": c.name,
                **c.degrees.model_dump(),
                **{strategy: c.strategies.get(strategy, 0) for strategy in STRATEGIES},
                "step_seconds": c.step_seconds,
                "reason": c.reason,
            }
            for c in self.candidates
        ]
        columns = ["name", *Degrees.model_fields, *STRATEGIES, "step_seconds", "reason"]
        frame = pd.DataFrame(rows, columns=columns).astype({"step_seconds": float})
        return frame.sort_values("step_seconds", kind="stable", ignore_index=True)

    def parts_frame(self) -> "pandas.DataFrame":
        """Predicted seconds of every layer (index; -1 outside the layers) by part (columns), mean over devices."""
        import pandas as pd

        parts = {entry.layer: entry.parts for entry in self.predicted.layers}
        return pd.DataFrame.from_dict(parts, orient="index").rename_axis("layer").sort_index().fillna(0.0)

    @classmethod
    def hint(cls) -> str:
        return "; make one with `moeplan solve`"

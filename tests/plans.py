"""Plans written by hand, for tests that execute them: the prediction in them is made up."""

from collections.abc import Sequence

import numpy as np

from moeplan.spec import Model, Plan, Workload
from moeplan.spec.foresight import Foresight, resting, written
from moeplan.spec.offload import Offload
from moeplan.spec.plan import (
    Degrees,
    DeviceMemory,
    LayerPlan,
    LayerPrediction,
    PlanDevice,
    Prediction,
    RoutingSource,
    SolverRecord,
)

MEMORY = 2**30


def even_slots(experts: int, devices: int) -> tuple[tuple[int, ...], ...]:
    """Consecutive experts on each device."""
    bounds = [g * experts // devices for g in range(devices + 1)]
    return tuple(tuple(range(bounds[g], bounds[g + 1])) for g in range(devices))


def made_up_foresight(layers: Sequence[LayerPlan], experts: int, least: float = 0.3) -> Foresight:
    """Of offload layers, with probabilities that mean nothing."""
    rng = np.random.default_rng(7)
    tables = [rng.random((len(resting(layer.slots, layer.resident or ())), experts)) ** 4 for layer in layers[1:]]
    return Foresight(least=least, tokens=1, chances=tuple(map(written, tables)))


def hand_made_plan(
    model: Model,
    workload: str | Workload,
    layers: Sequence[LayerPlan],
    *,
    tokens: Sequence[int],
    tensor: int = 1,
    sequences: Sequence[int] | None = None,
    hosts: Sequence[str] | None = None,
    dtype: str = "f32",
    threads: int = 1,
    cpu_share: float = 1.0,
    stored_layers: int | None = None,
    routing: RoutingSource | None = None,
    predicted: float = 0.01,
    offload: Offload | None = None,
) -> Plan:
    """A plan for ``len(tokens)`` devices; ``layers`` are repeated as often as the model needs."""
    devices = len(tokens)
    if isinstance(workload, str):
        workload = Workload.from_text(workload)
    if sequences is None:
        held = [sum(tokens[g : g + tensor]) for g in range(0, devices, tensor)]
        sequences = [count // workload.length for count in held]
    moe_layers = len(model.moe_layers)
    return Plan(
        model=model,
        workload=workload,
        dtype=dtype,
        devices=tuple(
            PlanDevice(host=host, kind="cpu", name="cpu", threads=threads, cpu_share=cpu_share, memory_bytes=MEMORY)
            for host in (hosts or ["host"] * devices)
        ),
        degrees=Degrees(tensor=tensor, data=devices // tensor, expert=devices),
        sequences=tuple(sequences),
        tokens=tuple(tokens),
        layers=tuple(layers[i % len(layers)] for i in range(moe_layers)),
        stored_layers=stored_layers or len(model.layers),
        offload=offload,
        routing=routing or RoutingSource(kind="assumed", assumption="power law", seed=3),
        predicted=Prediction(
            step_seconds=predicted,
            layers=(
                LayerPrediction(layer=-1, parts={"embed": predicted / 10, "head": predicted / 10}),
                *(
                    LayerPrediction(layer=i, parts={"attention": predicted / 10, "expert": predicted / 10})
                    for i in range(len(model.layers))
                ),
            ),
            memory=(DeviceMemory(weights=1, gathered=0, cache=0, activations=0, limit=MEMORY),) * devices,
            traffic=(),
        ),
        solver=SolverRecord(status="feasible", objective=predicted, bound=0.0, gap=1.0, space="none"),
        solve_seconds=0.0,
        baselines={},
        digests={},
        seed=11,
    )

"""A decision to move as a Placement, and what a placement means to the solvers."""

# W windows, B batches, L layers, E experts

from dataclasses import replace

import numpy as np

from ...solvers.slots import Slots
from ...spec.model import Model
from ...spec.placement import Moves, Placement, PlacementLayer, PlacementSolver, TraceSource
from ...spec.trace import Trace
from ..place.compared import baseline_slots, scores
from ..place.fleet import Fleet, even_fleet
from ..place.layers import document_layers
from ..place.replan import copies_by_layer, slots_of
from ..place.request import Request
from ..place.single import Single
from .decide import Decision

MINIMISED = "balance of the traffic decided on; chosen for gain less cost of moving, the bound holds for any moves"


def fleet_of(placement: Placement) -> Fleet:
    """Its devices. Where all hold as many experts, as engines demand, they have that many slots and no more."""
    fleet = Fleet.of(placement.devices)
    if placement.equal_slots:
        held = len(placement.layers[0].slots[0])
        fleet = replace(fleet, capacity=np.full(len(fleet.speed), held))
    return fleet


def old_slots(placement: Placement) -> Slots:
    """What serves now, in the slots of ``fleet_of``."""
    return slots_of(placement, fleet_of(placement).capacity)


def moved(placement: Placement, decision: Decision, batches: np.ndarray, limit: int | None) -> Placement:
    """The new placement, scored on the traffic that it was decided on; batches: [B, L, E]."""
    if decision.slots is None:
        raise ValueError("the decision is to keep the old placement")
    # Imported when it is needed: the solvers take a second to load.
    from ..place.proof import least_balance

    fleet, trace = fleet_of(placement), Trace.of_counts(batches.sum(axis=0), model=placement.model, source="watched")
    layers = document_layers(decision.slots)
    held = max(sum(map(len, layer.slots)) for layer in layers)
    request = Request(placement.devices, held, groups=placement.groups)
    usual = baseline_slots(trace, request, fleet)
    known = {name: scores(document_layers(slots), request, trace, None) for name, slots in usual.items()}
    mine = scores(layers, request, trace, None)
    full = placement.equal_slots
    least = least_balance(batches.sum(axis=0)[None], Single(fleet, "ep", placement.groups), placement.share_rule, full)
    value = mine.fit.balance_mean
    bound = min(float(least.mean()), value)
    loads = copies_by_layer(placement, layers)
    sizes = placement.expert_bytes
    return placement.model_copy(
        update={
            "layers": layers,
            "objective": "balance",
            "balance_cap": None,
            "balance_cap_of": None,
            "solver": PlacementSolver(
                status="optimal" if bound >= value * (1 - 1e-9) else "feasible",
                objective=value,
                bound=bound,
                gap=max((value - bound) / value, 0.0),
                seconds=0.0,
                minimised=MINIMISED,
                found_by="moeplan watch",
                bounds={"balance": bound},
            ),
            "scores": {"placement": mine, **known},
            "trace": TraceSource(digest=trace.digest(), counts_only=True),
            "moves": Moves(
                previous="the placement before",
                copies=decision.moves,
                limit=limit,
                bytes=None if sizes is None else int(np.dot(loads, sizes)),
            ),
            "notes": (
                "decided on counts: balance is planned, affinity between layers is not looked at; a placement that "
                "kept tokens near loses some of that where its experts move",
            ),
        }
    )


def linear_start(model: Model, devices: int, hosts: int) -> Placement:
    """Experts by number in equal blocks, as engines begin. Raises MoeplanError where the model has none, or the counts
    do not divide."""
    moe = model.moe_block().moe
    assert moe is not None
    experts, layers = moe.num_experts, len(model.moe_layers)
    held = tuple(tuple(part.tolist()) for part in np.array_split(np.arange(experts), devices))
    return Placement(
        model=model.name,
        expert_bytes=expert_bytes(model),
        num_experts=experts,
        devices=even_fleet(devices, hosts, experts, True, experts),
        layers=(PlacementLayer(slots=held),) * layers,
        objective="balance",
        movement="ep",
        solver=PlacementSolver(
            status="feasible", objective=0.0, bound=0.0, gap=0.0, seconds=0.0, minimised="nothing", found_by="by number"
        ),
        scores={},
        trace=TraceSource(),
    )


def expert_bytes(model: Model) -> tuple[int, ...]:
    """[L] of one expert of each layer, as the model stores it."""
    return tuple(model.expert_bytes(ordinal) for ordinal in range(len(model.moe_layers)))

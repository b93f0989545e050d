"""What to place for, and what is wrong with it, as text."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...spec.errors import InfeasibleError, MoeplanError
from ...spec.placement import MAX_CELLS, Movement, Objective, Placement, PlacementDevice, Shares
from ...spec.trace import Trace
from .fleet import Fleet, check_groups

if TYPE_CHECKING:
    from .timed import Timing


@dataclass(frozen=True)
class Request:
    """What to place for, as ``moeplan place`` takes it.

    slots: copies per layer in all; by default one of every expert. fit: part of the trace, as fractions.
    balance_cap: on the mean balance of the fitted part; by default what keeps about EPLB's on tokens to come.
    steps: proposals of each chain of the search, the work budget; by default in proportion to the experts.
    timing: makes predicted time the objective.
    """

    devices: tuple[PlacementDevice, ...]
    slots: int
    fit: tuple[float, float] = (0.0, 1.0)
    objective: Objective = "latency"
    movement: Movement = "coherent"
    shares: Shares = "even"
    equal_slots: bool = False
    groups: int = 1
    balance_cap: float | None = None
    previous: Placement | None = None
    max_moves: int | None = None
    steps: int | None = None
    time_limit: float = 20.0
    seed: int = 0
    timing: "Timing | None" = None


def check(trace: Trace, fitted: Trace, request: Request, fleet: Fleet) -> list[str]:
    """What is worth saying about the input; raises where it cannot be used."""
    experts, capacity = trace.num_experts, int(fleet.capacity.sum())
    cells = trace.layers * experts * len(request.devices)
    if cells > MAX_CELLS:
        raise MoeplanError(
            f"{trace.layers:,} layers x {experts:,} experts x {len(request.devices):,} devices are {cells:,}, at most "
            f"{MAX_CELLS:,} are placed: use fewer --devices"
        )
    if request.slots < experts or capacity < experts:
        raise InfeasibleError(
            f"{experts} experts need {experts} slots, got {min(request.slots, capacity)}: raise --slots"
        )
    if request.groups > 1:
        check_groups(request.groups, experts, len(fleet.names))
    if request.max_moves is not None and request.previous is None:
        raise MoeplanError("--max-moves needs --previous: moves are counted from an old placement")
    if request.previous is not None:
        _check_previous(request, trace)
    if request.balance_cap is not None and not 1 <= request.balance_cap < np.inf:
        raise MoeplanError(f"--balance-cap {request.balance_cap:g}: the hottest device over the mean is at least 1")
    notes = [] if request.timing is None else [request.timing.note]
    useful = _useful_slots(request, experts, fleet)
    if useful < request.slots:
        of = "its host's experts" if request.groups > 1 else f"{experts} experts"
        notes.append(
            f"{request.slots} slots are asked for, {useful} can be used: a device holds no expert twice, and so at "
            f"most {of}; the others stay empty"
        )
    if request.slots > experts and request.objective != "balance" and request.timing is None and not fitted.counts_only:
        notes.append("with copies balance is what is minimised; what moves only decides which host gets which expert")
    if fitted.counts_only:
        why = "the trace has counts only" if trace.counts_only else "tokens of the trace chose identity experts, too"
        notes.append(f"{why}: balance is planned, affinity between layers is unknown")
        if request.objective != "balance":
            notes.append(f"objective {request.objective} needs expert_ids per token: balance was planned instead")
    else:
        needed = tokens_needed(experts)
        if fitted.tokens * trace.top_k < experts:
            raise MoeplanError(
                f"{fitted.tokens} tokens cannot say how {experts} experts are used: record about {needed} tokens"
            )
        if fitted.tokens < needed:
            notes.append(
                f"{fitted.tokens} tokens are few to trust for {experts} experts: about {needed} are needed; expect the "
                "held-out scores to be worse than the fitted ones"
            )
    return notes


def _useful_slots(request: Request, experts: int, fleet: Fleet) -> int:
    """Slots that can hold different experts of their device."""
    each = experts // len(fleet.names) if request.groups > 1 else experts
    return min(request.slots, int(np.minimum(fleet.capacity, each).sum()))


def tokens_needed(experts: int) -> int:
    """Tokens after which affinity hardly changes: about 1,000 for 8 experts and 3,000 for 64 (ExFlow)."""
    return round(1000 + (experts - 8) * 2000 / 56)


def _check_previous(request: Request, trace: Trace) -> None:
    old = request.previous
    assert old is not None
    got, want = (len(old.layers), old.num_experts), (trace.layers, trace.num_experts)
    if got != want:
        raise MoeplanError(f"--previous has {got[0]} layers x {got[1]} experts, the trace {want[0]} x {want[1]}")
    if len(old.devices) != len(request.devices):
        raise MoeplanError(f"--previous is for {len(old.devices)} devices, not {len(request.devices)}")
    for i, layer in enumerate(old.layers):
        for d, (experts, device) in enumerate(zip(layer.slots, request.devices, strict=True)):
            if len(experts) > device.capacity:
                raise MoeplanError(
                    f"--previous has {len(experts)} experts on device {d} in layer {i}, and there are "
                    f"{device.capacity} slots: give as many --slots as it has"
                )
    if request.groups > 1:
        size, host = trace.num_experts // request.groups, Fleet.of(request.devices).hosts
        for i, layer in enumerate(old.layers):
            places = {(e // size, int(host[d])) for d, experts in enumerate(layer.slots) for e in experts}
            if len(places) > request.groups:
                raise MoeplanError(f"--previous splits expert groups over hosts in layer {i}: place without it")

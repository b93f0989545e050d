"""Why a placement is what it is: what limits it, where it is hot, what still crosses, what another slot would buy.

Everything is counted on the part of the trace that the placement was fitted on; the rest is shown beside it. Layers are
counted from 0 among those with experts, as in the document.
"""

# L layers, E experts, G devices

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...solvers.balance import idle
from ...solvers.result import SolverError
from ...spec import balance
from ...spec.catalogue import load_model
from ...spec.errors import MoeplanError
from ...spec.placement import Placement, Score, Scores
from ...spec.trace import Trace
from .crossings import Boundary, Fanout, boundaries, fanout
from .sample import load_samples
from .score import score

AT_CAP = 0.005  # relative: a balance this close to its cap is held by it
OWN = "placement"  # its name in ``Placement.scores``, beside those of baselines
HEAVIEST = 3  # experts of a device
SLOT_SECONDS = 15.0  # a ceiling on each of the two solves for one more slot


@dataclass(frozen=True)
class Limit:
    """One constraint of the solve; binding: the placement is at it."""

    name: str
    binding: bool
    text: str


@dataclass(frozen=True)
class ExpertShare:
    """An expert on a device; share: of the layer's load, what this copy takes; copies: on all devices."""

    expert: int
    share: float
    copies: int


@dataclass(frozen=True)
class HotSpot:
    """The hottest device of a layer: its time over that of all devices equally busy.

    held_out: the same of the layer's hottest device there, which may be another. heaviest_alone: the same, if the
    device had its heaviest expert only.
    """

    layer: int
    device: int
    host: str
    over_ideal: float
    held_out: float | None
    heaviest_alone: float
    experts: tuple[ExpertShare, ...]


@dataclass(frozen=True)
class OneMoreSlot:
    """Balance (mean over layers), when experts are placed anew for balance alone.

    now: of this placement. same_slots: placed anew in its own slots. more_slots: with one more per device and layer.
    bounds: no placement is better. bytes_per_device: the further slots of all layers; None where not known.
    """

    now: float
    same_slots: float
    same_slots_bound: float
    more_slots: float
    more_slots_bound: float
    bytes_per_device: int | None


@dataclass(frozen=True)
class Explanation:
    """What was found, on the fitted part (fitted: False where nothing of the trace was fitted: then on all of it).

    load_over_ideal: [L][G]. busiest_device, busiest_over_ideal: with the work of all layers added up.
    boundaries, fanout: every layer, the worst first; None where they cannot be told, which the notes explain.
    """

    fitted: bool
    fit: Score
    held_out: Score | None
    limits: tuple[Limit, ...]
    load_over_ideal: list[list[float]]
    busiest_device: int
    busiest_over_ideal: float
    hot_spots: tuple[HotSpot, ...]
    boundaries: tuple[Boundary, ...] | None
    fanout: tuple[Fanout, ...] | None
    one_more_slot: OneMoreSlot | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        scores = {n: s and s.model_dump(mode="json") for n, s in (("fit", self.fit), ("held_out", self.held_out))}
        return asdict(self) | scores


def explain(placement: Placement, trace: Trace, *, worst: int = 5, seed: int = 0) -> Explanation:
    """Explain ``placement`` with the routing that it was fitted on, or with other routing of its model.

    worst: how many layers and boundaries to look into. MoeplanError where the trace has another shape.
    """
    fit, rest, notes = divide(trace, {"the placement": placement})
    part, held_out = (fit, rest) if fit else (trace.for_placement(), None)
    counts, over = part.expert_counts, over_ideal(placement, part.expert_counts)
    sizes, unknown = expert_bytes(placement)
    slot, unsolved = one_more_slot(placement, counts, sizes, seed)
    movement = not part.counts_only
    if not movement:
        notes.append("the trace holds counts only: what crosses between layers, and fan-out, cannot be told from it")
    elif not placement.single_copy:
        notes.append("some experts have several copies, and a token may meet any of them: crossings are not counted")
    elif len(placement.layers) == 1:
        notes.append("one layer has no boundary that could be crossed")
    crossable = movement and placement.single_copy and len(placement.layers) > 1
    measured = measure(placement, part)
    busy = (over * counts.sum(axis=1, keepdims=True)).sum(axis=0) / (counts.sum() or 1.0)
    return Explanation(
        fitted=fit is not None,
        fit=measured,
        held_out=measure(placement, held_out) if held_out else None,
        limits=limits(placement, part),
        load_over_ideal=over.tolist(),
        busiest_device=int(busy.argmax()),
        busiest_over_ideal=float(busy.max()),
        hot_spots=hot_spots(placement, counts, held_out.expert_counts if held_out else None, worst),
        boundaries=boundaries(placement, part, over, worst) if crossable else None,
        fanout=fanout(placement, part.expert_ids) if movement else None,
        one_more_slot=slot,
        notes=tuple(note for note in (*notes, unknown, unsolved) if note),
    )


def divide(trace: Trace, placements: Mapping[str, Placement]) -> tuple[Trace | None, Trace | None, list[str]]:
    """(what any of the named placements was fitted on, what none of them saw, notes); one of the two may be None.

    MoeplanError where the trace has other layers or experts than a placement.
    """
    digest, notes, fits = trace.digest(), [], []
    for name, placement in placements.items():
        got, want = (trace.layers, trace.num_experts), (len(placement.layers), placement.num_experts)
        if got != want:
            raise MoeplanError(
                f"the trace has {got[0]} layers x {got[1]} experts, {name} {want[0]} x {want[1]}: "
                "pass a trace of the placement's model with --trace"
            )
        named = placement.trace.digest
        if named not in ("", digest):
            notes.append(f"{name} was fitted on another trace (digest {named}, this one has {digest})")
            continue
        if not named:
            notes.append(f"{name} names no digest: whether it was fitted on this trace cannot be checked")
        fits.append(placement.trace.fit)
    if not fits:
        return None, trace.for_placement(), notes
    low, high = min(fit[0] for fit in fits), max(fit[1] for fit in fits)
    if len(set(fits)) > 1:
        notes.append(f"fitted on different parts: what either saw ({low:g}:{high:g}) counts as fitted for both")
    if trace.counts_only:
        return trace, None, notes
    return trace.part(low, high).for_placement(), _outside(trace, low, high), notes


def _outside(trace: Trace, low: float, high: float) -> Trace | None:
    """The tokens before and after a part; None where there are none."""
    parts = []
    for first, end in ((0.0, low), (high, 1.0)):
        try:
            parts += [trace.part(first, end)] if first < end else []
        except MoeplanError:  # narrower than a sequence: nothing is there
            continue
    if len(parts) < 2:
        return parts[0].for_placement() if parts else None
    ids, lengths = (np.concatenate([getattr(part, name) for part in parts]) for name in ("expert_ids", "seq_len"))
    return Trace.of(ids, trace.num_experts, zero_experts=trace.zero_experts, seq_len=lengths).for_placement()


def over_ideal(placement: Placement, counts: np.ndarray) -> np.ndarray:
    """[L, G] each device's time over that of all devices equally busy; 1 in a layer without load. counts: [L, E]."""
    load = np.stack([row @ layer.share_matrix(len(row)) for row, layer in zip(counts, placement.layers, strict=True)])
    return balance.over_ideal(load, _speed(placement))


def measure(placement: Placement, trace: Trace) -> Score:
    """The scores of a placement on a trace; those of movement are None for counts only."""
    return score(placement.layers, placement.devices, trace)


def hot_spots(placement: Placement, counts: np.ndarray, held_out: np.ndarray | None, worst: int) -> tuple[HotSpot, ...]:
    """The hottest device of the ``worst`` layers, hottest first. counts, held_out: [L, E]."""
    over, speed = over_ideal(placement, counts), _speed(placement)
    later = over_ideal(placement, held_out).max(axis=1) if held_out is not None else None
    spots = []
    for i in np.argsort(-over.max(axis=1), kind="stable")[:worst].tolist():
        device, matrix = int(over[i].argmax()), placement.layers[i].share_matrix(placement.num_experts)
        share = matrix[:, device] * counts[i] / (counts[i].sum() or 1.0)
        alone = float(share.max() * speed.sum() / speed[device])
        heaviest = [e for e in np.argsort(-share, kind="stable").tolist() if matrix[e, device] > 0][:HEAVIEST]
        experts = tuple(ExpertShare(e, float(share[e]), int((matrix[e] > 0).sum())) for e in heaviest)
        host, after = placement.devices[device].host, float(later[i]) if later is not None else None
        spots.append(HotSpot(i, device, host, float(over[i, device]), after, alone, experts))
    return tuple(spots)


def limits(placement: Placement, part: Trace) -> tuple[Limit, ...]:
    """What the solve had to keep, and whether the placement is at it, on the fitted part."""
    found = []
    if placement.balance_cap is not None:
        found.append(_cap_limit(placement, placement.balance_cap, part))
    found.append(_slot_limit(placement))
    if placement.groups > 1:
        found.append(_group_limit(placement, part.expert_counts))
    if placement.moves is not None:
        copies, most = placement.moves.copies, placement.moves.limit
        reached = most is not None and copies >= most
        allowed = "without a limit" if most is None else f"of at most {most}"
        more = ": a larger --max-moves may find better" if reached else ""
        found.append(Limit("moves", reached, f"{copies} copies to load {allowed}{more}"))
    return tuple(found)


def _cap_limit(placement: Placement, cap: float, part: Trace) -> Limit:
    """Binding where what the cap is of, the load of the part or the mean over its samples, is at the cap."""
    sampled = placement.balance_cap_of == "samples"
    loads = load_samples(part) if sampled else part.expert_counts[None]
    reached = float(np.mean([over_ideal(placement, counts).max(axis=1) for counts in loads]))
    binds = reached >= cap * (1 - AT_CAP)
    of = " as a mean over load samples" if sampled else ""
    state = "less movement would cost balance" if binds else "balance is not what holds it back"
    return Limit("balance cap", binds, f"{reached:.4f}{of} of at most {cap:.4f}: {state}")


def _slot_limit(placement: Placement) -> Limit:
    """Binding where no device has a free slot in any layer."""
    capacity = np.array([device.capacity for device in placement.devices])
    free = capacity - np.array([[len(experts) for experts in layer.slots] for layer in placement.layers])
    total, devices = int(capacity.sum()), len(capacity)
    spare = f"{total} slots per layer for {placement.num_experts} experts"
    if not free.any():
        copies = "" if total > placement.num_experts else ": no slot for a second copy of any expert"
        return Limit("slots", True, f"all {devices} devices are full in every layer, {spare}{copies}")
    full, layers = int((free == 0).all(axis=0).sum()), len(placement.layers)
    return Limit(
        "slots", False, f"{full} of {devices} devices are full, {free.sum() / layers:.1f} slots free per layer; {spare}"
    )


def _group_limit(placement: Placement, counts: np.ndarray) -> Limit:
    """Binding where the groups alone force a worse balance than the slots do."""
    groups, hosts = placement.groups, placement.hosts
    if placement.num_experts % groups or groups % (int(hosts.max()) + 1):
        return Limit("groups", True, f"{groups} groups do not divide {placement.num_experts} experts and the hosts")
    if torn := _torn_groups(placement):
        return Limit("groups", False, f"{groups} groups are not kept: {torn} (layer, group) stand on several hosts")
    with_groups, free = (_balance_bound(placement, counts, number) for number in (groups, 1))
    text = f"{groups} groups, each on one host: at best {with_groups:.4f} in balance with them, {free:.4f} without"
    return Limit("groups", with_groups > free * (1 + AT_CAP), text)


def _torn_groups(placement: Placement) -> int:
    """How many groups, over all layers, stand on more than one host."""
    if placement.groups == 1:
        return 0
    held = [layer.share_matrix(placement.num_experts) > 0 for layer in placement.layers]
    parts = [part.any(axis=0) for layer in held for part in np.array_split(layer, placement.groups)]
    return sum(len(np.unique(placement.hosts[part])) > 1 for part in parts)


def _balance_bound(placement: Placement, counts: np.ndarray, groups: int) -> float:
    """No placement in these slots has a better balance, as a mean over layers. counts: [L, E]."""
    # Imported when it is needed: the solvers take a second to load.
    from ...solvers.bounds.replication import hottest_bound

    capacity = np.array([device.capacity for device in placement.devices])
    load, speed = _normalised(placement, counts), _speed(placement)
    return float(hottest_bound(load, speed, capacity, placement.hosts, groups, placement.share_rule).mean()) + idle(
        counts
    )


def one_more_slot(
    placement: Placement, counts: np.ndarray, sizes: list[int] | None, seed: int = 0
) -> tuple[OneMoreSlot | None, str]:
    """(what one more slot per device and layer would do to the balance, or None; why None).

    Placed anew for balance alone, twice: in the placement's own slots, and with the further ones, so that what the
    slots buy is told from what giving up locality buys. counts: [L, E]; sizes: [L] bytes of an expert.
    """
    # Imported when it is needed: the solvers take a second to load.
    from ...solvers import compiled
    from ...solvers.replication.replicate import replicate

    capacity = np.array([device.capacity for device in placement.devices])
    if (capacity >= placement.num_experts).all():
        return None, "one more slot: every device has a slot for every expert already"
    load, speed = _normalised(placement, counts), _speed(placement)
    now = float(over_ideal(placement, counts).max(axis=1).mean())
    found: list[tuple[float, float]] = []
    # A placement that tears its groups is none that the solver may return: no reason to be as good.
    least = np.inf if _torn_groups(placement) else now
    compiled.load_all()
    try:
        for more in (0, 1):
            solution = replicate(
                load,
                speed,
                capacity + more,
                placement.hosts,
                groups=placement.groups,
                shares=placement.share_rule,
                seed=seed,
                time_limit=SLOT_SECONDS,
            )
            least = min(least, solution.objective / len(load) + idle(counts))
            found.append((least, min(least, solution.bound / len(load) + idle(counts))))
    except SolverError as error:
        return None, f"one more slot: not answered ({error})"
    return OneMoreSlot(now, *found[0], *found[1], sum(sizes) if sizes else None), ""


def expert_bytes(placement: Placement) -> tuple[list[int] | None, str]:
    """([L] bytes of one expert of each layer as stored, or None; why they are not known)."""
    if placement.expert_bytes and len(placement.expert_bytes) == len(placement.layers):
        return list(placement.expert_bytes), ""
    if not placement.model:
        return None, "no model is named: sizes in bytes are left out"
    try:
        model = load_model(placement.model)
    except MoeplanError as error:
        return None, f"sizes in bytes are left out: {error}"
    moe = model.moe_block().moe
    got = (len(model.moe_layers), moe.num_experts if moe else 0)
    if got != (len(placement.layers), placement.num_experts):
        return None, (
            f"sizes in bytes are left out: {placement.model} has {got[0]} layers x {got[1]} experts, "
            f"the placement {len(placement.layers)} x {placement.num_experts}"
        )
    return [model.expert_bytes(i) for i in range(got[0])], ""


def own_scores(placement: Placement) -> Scores | None:
    """What the document says of the placement itself; None where it holds scores of baselines only."""
    return placement.scores.get(OWN)


def _speed(placement: Placement) -> np.ndarray:
    """[G] relative."""
    return np.array([device.speed for device in placement.devices])


def _normalised(placement: Placement, counts: np.ndarray) -> np.ndarray:
    """[L, E] loads in units of the layer's ideal time, so that a hottest device's time is its balance."""
    ideal = counts.sum(axis=1, keepdims=True) / _speed(placement).sum()
    return counts / np.where(ideal > 0, ideal, 1.0)

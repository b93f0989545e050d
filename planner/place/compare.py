"""Two placements side by side: scores on the same tokens, what moves between them, and which is better in what."""

# L layers, E experts, G devices

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ...spec.errors import MoeplanError
from ...spec.placement import Placement, Score
from ...spec.trace import Trace
from .explain import divide, expert_bytes, measure, own_scores

Part = Literal["fit", "held_out"]
PARTS: dict[Part, str] = {"held_out": "on the held-out part", "fit": "on the fitted part"}
SAME = 5e-3  # relative: scores this close are called the same
MEASURES = {
    "step_seconds": "predicted step",
    "balance_mean": "balance, mean over layers",
    "balance_max": "balance, worst layer",
    "boundary_cross_host": "boundaries that cross hosts",
    "boundary_cross_device": "boundaries that cross devices",
    "fanout_host": "fan-out over hosts",
    "fanout_device": "fan-out over devices",
}


@dataclass(frozen=True)
class Difference:
    """One measure of both placements on one part of the trace; lower is better in all of them."""

    part: Part
    measure: str
    a: float
    b: float

    @property
    def change(self) -> float:
        """Of b against a, relative."""
        return (self.b - self.a) / self.a if self.a else float(self.b > 0)

    @property
    def better(self) -> Literal["A", "B", "same"]:
        return "same" if abs(self.b - self.a) <= SAME * max(self.a, self.b) else "A" if self.a < self.b else "B"


@dataclass(frozen=True)
class Comparison:
    """From A to B. rescored: on one trace, else the documents' own scores.

    a, b: the scores on the fitted part and on the rest, as far as there are such parts.
    changed: [L] experts that are on other devices. copies: [L] copies that a device of B holds and did not hold in A.
    bytes: of those copies' weights; None where not known.
    """

    rescored: bool
    a: dict[Part, Score]
    b: dict[Part, Score]
    differences: tuple[Difference, ...]
    changed: tuple[int, ...]
    copies: tuple[int, ...]
    bytes: int | None
    verdict: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        body = asdict(self)
        for name in ("a", "b"):
            body[name] = {part: score.model_dump(mode="json") for part, score in body[name].items()}
        body["differences"] = [asdict(d) | {"change": d.change, "better": d.better} for d in self.differences]
        totals = {"changed_in_all": sum(self.changed), "copies_in_all": sum(self.copies)}
        return body | totals


def compare(a: Placement, b: Placement, trace: Trace | None) -> Comparison:
    """Compare two placements of one shape, scored on ``trace`` where one is given.

    What either was fitted on counts as fitted for both, so that neither is favoured on the rest. MoeplanError where the
    shapes differ.
    """
    check_shapes(a, b)
    notes = _differing(a, b)
    if trace is None:
        scores = _recorded(a), _recorded(b)
        if a.trace.digest != b.trace.digest or not a.trace.digest:
            notes.append("scored on different traces, so the scores do not compare well: pass one with --trace")
        elif a.trace.fit != b.trace.fit:
            notes.append("fitted on different parts of the trace: the scores are not of the same tokens")
    else:
        fit, rest, found = divide(trace, {"A": a, "B": b})
        notes += found
        scores = _measured(a, trace, fit, rest), _measured(b, trace, fit, rest)
    differences = _differences(*scores)
    sizes, unknown = expert_bytes(b if b.model else a)
    copies = to_load(a, b)
    return Comparison(
        rescored=trace is not None,
        a=scores[0],
        b=scores[1],
        differences=differences,
        changed=tuple(changed_experts(a, b).tolist()),
        copies=tuple(copies.tolist()),
        bytes=int(copies @ np.array(sizes)) if sizes else None,
        verdict=_verdict(differences),
        notes=tuple(note for note in (*notes, unknown) if note),
    )


def check_shapes(a: Placement, b: Placement) -> None:
    """Layers, experts and device count must be the same."""
    for name, first, second in (
        ("layers", len(a.layers), len(b.layers)),
        ("experts", a.num_experts, b.num_experts),
        ("devices", len(a.devices), len(b.devices)),
    ):
        if first != second:
            raise MoeplanError(
                f"compare: A has {first} {name}, B {second}: only placements of the same layers, experts and "
                "number of devices compare"
            )


def changed_experts(a: Placement, b: Placement) -> np.ndarray:
    """[L] experts whose set of devices differs."""
    return np.array([(x != y).any(axis=1).sum() for x, y in zip(_held(a), _held(b), strict=True)])


def to_load(a: Placement, b: Placement) -> np.ndarray:
    """[L] copies that a device holds in B and did not hold in A: what must be loaded to go from A to B."""
    return np.array([(y & ~x).sum() for x, y in zip(_held(a), _held(b), strict=True)])


def _held(placement: Placement) -> list[np.ndarray]:
    """Per layer [E, G]: whether a device holds an expert."""
    return [layer.share_matrix(placement.num_experts) > 0 for layer in placement.layers]


def _differing(a: Placement, b: Placement) -> list[str]:
    notes = []
    if a.model and b.model and a.model != b.model:
        notes.append(f"placements of different models: A is of {a.model}, B of {b.model}")
    if [d.host for d in a.devices] != [d.host for d in b.devices]:
        notes.append("devices are on different hosts in A and B: devices are matched by their number")
    if [d.speed for d in a.devices] != [d.speed for d in b.devices]:
        notes.append("devices have different speeds in A and B: each is scored with its own")
    if (a.objective, a.movement, a.solver.minimised) != (b.objective, b.movement, b.solver.minimised):
        notes.append("different objectives: their values do not compare, the scores do")
    return notes


def _recorded(placement: Placement) -> dict[Part, Score]:
    own = own_scores(placement)
    if own is None:
        return {}
    parts: dict[Part, Score | None] = {"fit": own.fit, "held_out": own.held_out}
    return {name: score for name, score in parts.items() if score is not None}


def _measured(placement: Placement, trace: Trace, fit: Trace | None, rest: Trace | None) -> dict[Part, Score]:
    """Anew; the predicted step, which needs the cluster, is the document's where it was of the same tokens."""
    parts: dict[Part, Trace | None] = {"fit": fit, "held_out": rest}
    scores = {name: measure(placement, part) for name, part in parts.items() if part is not None}
    if placement.trace.digest == trace.digest():
        for name, own in _recorded(placement).items():
            if name in scores and own.tokens == scores[name].tokens:
                scores[name] = scores[name].model_copy(update={"step_seconds": own.step_seconds})
    return scores


def _differences(a: dict[Part, Score], b: dict[Part, Score]) -> tuple[Difference, ...]:
    found = []
    for part in a.keys() & b.keys():
        for name in MEASURES:
            x, y = getattr(a[part], name), getattr(b[part], name)
            if x is not None and y is not None:
                found.append(Difference(part, name, x, y))
    return tuple(sorted(found, key=lambda d: d.part))


def _verdict(differences: tuple[Difference, ...]) -> tuple[str, ...]:
    """One sentence for each placement that is better in something, on the held-out part where there is one."""
    part = next((part for part in PARTS if any(d.part == part for d in differences)), None)
    if part is None:
        return ("no scores to compare: pass a trace with --trace",)
    judged = [d for d in differences if d.part == part]
    said = []
    for side in ("A", "B"):
        wins = [d for d in judged if d.better == side]
        everything = "everything that is scored: " if len(wins) == len(judged) else ""
        texts = []
        for d in wins:
            own, other = (d.a, d.b) if side == "A" else (d.b, d.a)
            texts.append(f"{MEASURES[d.measure]} ({own:.4g} against {other:.4g}, {(own - other) / other:+.1%})")
        if wins:
            said.append(f"{side} is better {PARTS[part]} in {everything}{'; '.join(texts)}")
    return tuple(said) or (f"neither is better {PARTS[part]}: all scores are the same within {SAME:.1%}",)

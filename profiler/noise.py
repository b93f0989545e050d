"""Which measured curves were too noisy to be believed, or to be used at all.

Two signs, each with a limit that was measured on a 2-core machine (tiny-moe, 2 ranks, 19 curves). Alone on it, the
typical spread of a curve (the median over its points) was 0.12 to 0.40, and 0.61 for one collective. With ten other
programs running all the time, spreads said little: operators, timed by their own processor's time, had 0.2 to 0.4 and
lay within a factor of 2 of the quiet curves; collectives had 0.3 to 0.6 and were 4 to 40 times too slow. What told them
apart: another program was there before nearly every call. So a curve is refused where most of its points were disturbed
in this sense, or where its spread is wider than the value itself by half.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from ..spec.cluster import CurveNoise, Provenance
from ..spec.cluster.measurement import Measurement
from ..spec.load import Load, note
from .grids import NOISY_SPREAD

UNUSABLE_SPREAD = 1.5
UNUSABLE_PART = 0.5  # of a curve's points disturbed
HELD_BACK = 0.1  # of the time by a quota: more is worth a note


def noise(measured: Measurement, disturbed: Sequence[Mapping[str, int]] = ()) -> tuple[CurveNoise, ...]:
    """One entry for each operator or collective, and for the links; ``disturbed``: each rank's points by name."""
    spreads: dict[str, list[float]] = {}
    for device in measured.devices:
        for entry in device.operators:
            spreads.setdefault(f"{entry.operator} ({entry.dtype})", []).extend(entry.curve.spread)
    for link in measured.links:
        spreads.setdefault("links", []).extend(link.curve.spread)
    for collective in measured.collectives:
        spreads.setdefault(collective.collective, []).extend(collective.curve.spread)
    # Members of a group count the same points; of links each rank counts its own.
    merge = {what: sum if what == "links" else max for what in spreads}
    counts = {what: merge[what]([rank.get(what, 0) for rank in disturbed] or [0]) for what in spreads}
    return tuple(summarised(what, values, counts[what]) for what, values in spreads.items())


def summarised(what: str, spreads: Sequence[float], disturbed: int = 0) -> CurveNoise:
    return CurveNoise(
        curve=what,
        points=len(spreads),
        noisy=sum(spread > NOISY_SPREAD for spread in spreads),
        typical=float(np.median(spreads)),
        worst=max(spreads),
        disturbed=disturbed,
    )


def warnings(found: Sequence[CurveNoise], load: Load | None = None) -> tuple[str, ...]:
    """What is worth a word: others on the machine, and the noisy curves."""
    lines = [*note(load, "while this was measured", "profile"), *(line for entry in found if (line := _warning(entry)))]
    if load is not None and load.foreign is None:
        lines.insert(0, f"whether the machine was busy is not known: there is no {', no '.join(load.missing)} here")
    elif load is not None and "/proc/stat" in load.missing:
        lines.insert(0, "only programs of this container are seen: there is no /proc/stat here")
    if load is not None and (load.throttled or 0.0) > HELD_BACK:
        lines.insert(0, f"a cgroup's quota held a rank back for {load.throttled:.0%} of the time")
    return tuple(lines)


def _warning(entry: CurveNoise) -> str | None:
    if max(entry.noisy, entry.disturbed) * 5 < entry.points or not entry.noisy + entry.disturbed:
        return None
    points = f"{entry.noisy} of {entry.points} points (median spread {entry.typical:.0%}, worst {entry.worst:.0%})"
    if entry.disturbed:
        points += f", {entry.disturbed} never undisturbed"
    return f"{entry.curve}: noisy at {points}; profile again on an idle machine"


def refusal(found: Sequence[CurveNoise], provenance: Provenance) -> str | None:
    """Why these curves may not be used, in one line; None where they may."""
    beyond = [
        entry for entry in found if entry.typical > UNUSABLE_SPREAD or entry.disturbed > UNUSABLE_PART * entry.points
    ]
    if not beyond:
        return None
    curves = ", ".join(
        f"{entry.curve} (spread {entry.typical:.0%}, {entry.disturbed} of {entry.points} points disturbed)"
        for entry in beyond
    )
    busy = f"{why}; " if provenance.load is not None and (why := provenance.load.takers) else ""
    return (
        f"measured for {provenance.seconds:.0f} s and still too noisy to predict with: {curves}; {busy}"
        "profile when the machine is idle, with a larger --budget to wait longer, or keep them with --accept-noise"
    )

"""Finds tables that cannot be right: by the roofline, by how times must grow, and by other tables of the same GPU.

What is judged is a *part*: the rows of one type of numbers in one file. A part is condemned when

- ``faster than possible``: over 5 % of the rows whose least time is 10 us or more were timed at under 1 / 1.1 of it;
- ``slow start``: on shapes whose least time is under 1 us it takes 4 times what the other tables of the same GPU take;
- ``flat``: work grows tenfold and more to 100 us and more, and in over a fifth of such curves time does not double;
- ``falling``: over a fifth of the points took 1.5 times what a later one, of more work, took;
- ``slow``: half of the rows whose least time is 100 us or more take 100 times that.

Single rows that are faster than possible are left out of a part that stands. Uneven routing that is faster than even is
told, and condemns nothing: it says that other ranks were timed or other kernels chosen, not which time is wrong.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...spec.tabled import System
from .layouts import LAYOUTS
from .roofline import CACHE_BYTES, COUNTED, least_seconds

if TYPE_CHECKING:
    import pandas as pd

TOLERANCE = 1.1  # clocks above the data sheet's, and rounding
SHARE, BIG = 0.05, 10e-6
START_RATIO, SMALL, SHARED = 4.0, 1e-6, 5
FLAT_SHARE, FLAT_GROWTH, FLAT_LEAST = 0.2, 2.0, 100e-6
FALL_SHARE, FALL = 0.2, 1.5
SLOW = 100.0
SKEW, SKEW_TOKENS, SKEW_EP = 0.9, 1024, 4
_TOLD = 4  # shapes that are named
_NO_SHAPE = {"kernel", "backend", "seconds", "source", "origin", "least"}


@dataclass(frozen=True)
class Fault:
    """What is wrong with one part; ``condemned``: it is not used where anything else can be."""

    operator: str
    system: str
    engine: str
    version: str
    dtype: str
    check: str
    condemned: bool
    text: str


@dataclass(frozen=True)
class Judged:
    """The rows of one file that can be used, those of condemned parts, and what was found."""

    good: "pd.DataFrame"
    condemned: "pd.DataFrame"
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Judge:
    """Judges the tables of one operator on one type of GPU."""

    operator: str
    system: System

    def judge(self, frame: "pd.DataFrame", engine: str, version: str, others: Iterable["pd.DataFrame"] = ()) -> Judged:
        """``others``: frames of other engines and versions on the same GPU type. What is not counted is not judged."""
        if self.operator not in COUNTED:
            return Judged(frame, frame.iloc[:0], ())
        timed = self._timed(frame)
        references = [self._timed(other) for other in others]
        impossible = (timed["seconds"] * TOLERANCE < self._least(frame, CACHE_BYTES)).to_numpy()
        faults, condemned = [], np.zeros(len(frame), dtype=bool)
        for dtype in sorted(timed["dtype"].unique()):
            here = (timed["dtype"] == dtype).to_numpy()
            part = timed[here]
            same = [other[other["dtype"] == dtype] for other in references]
            found = list(self._checks(part, impossible[here], same))
            faults += [Fault(self.operator, self.system.name, engine, version, dtype, *one) for one in found]
            if any(bad for _, bad, _ in found):
                condemned |= here
        return Judged(frame[~condemned & ~impossible], frame[condemned], tuple(faults))

    def _timed(self, frame: "pd.DataFrame") -> "pd.DataFrame":
        return frame.assign(least=self._least(frame))

    def _least(self, frame: "pd.DataFrame", cached: float = 0.0) -> np.ndarray:
        return least_seconds(frame, self.operator, self.system, cached)

    def _checks(
        self, part: "pd.DataFrame", impossible: np.ndarray, others: list["pd.DataFrame"]
    ) -> Iterator[tuple[str, bool, str]]:
        """Name, whether it condemns, and a sentence, of everything found."""
        found = (
            _faster_than_possible(part, impossible),
            _slow_start(part, others),
            _flat(part, self._axes),
            _falling(part, self._axes),
            _slow(part),
            _faster_under_skew(part) if "routing" in part else None,
        )
        yield from (one for one in found if one is not None)

    @property
    def _axes(self) -> tuple[str, ...]:
        return next(layout.axes for layout in LAYOUTS if layout.operator == self.operator)


Found = tuple[str, bool, str] | None


def _faster_than_possible(part: "pd.DataFrame", impossible: np.ndarray) -> Found:
    count, big = int(impossible.sum()), int((part["least"] >= BIG).sum())
    if not count:
        return None
    worst = float((part["least"] / part["seconds"])[impossible].max())
    condemned = count > SHARE * max(big, 1)
    text = (
        f"{count:,} of {big:,} rows of 10 us or more are faster than the data sheet allows, by up to {worst:.1f} times"
    )
    return "faster than possible", condemned, text + ("" if condemned else ": left out")


def _slow_start(part: "pd.DataFrame", others: list["pd.DataFrame"]) -> Found:
    mine = _best(_small(part))
    ratios = []
    for other in others:
        theirs = _best(_small(other))
        both = mine.merge(theirs, on=[name for name in mine.columns if name != "seconds" and name in theirs])
        if len(both) >= SHARED:
            ratios.append((float((both["seconds_x"] / both["seconds_y"]).median()), both["seconds_y"].median()))
        elif min(len(mine), len(theirs)) >= SHARED:  # other shapes, all of them mostly start
            ratios.append((float(mine["seconds"].median() / theirs["seconds"].median()), theirs["seconds"].median()))
    if not ratios:
        return None
    ratio = float(np.median([one for one, _ in ratios]))
    if ratio < START_RATIO:
        return None
    times = sorted({f"{float(time) * 1e6:.0f}" for _, time in ratios}, key=float)
    shown = " to ".join(dict.fromkeys((times[0], times[-1])))
    own = float(mine["seconds"].median()) * 1e6
    return "slow start", True, f"{own:.0f} us on the smallest shapes, where other tables of this GPU have {shown} us"


def _small(part: "pd.DataFrame") -> "pd.DataFrame":
    return part[(part["least"] > 0) & (part["least"] < SMALL)]


def _best(part: "pd.DataFrame") -> "pd.DataFrame":
    """The fastest kernel of every shape."""
    shape = [name for name in part.columns if name not in _NO_SHAPE]
    return part.groupby(shape, as_index=False, sort=False)[["seconds"]].min()


def _flat(part: "pd.DataFrame", axes: tuple[str, ...]) -> Found:
    worst: tuple[float, int, str] = (0.0, 0, "")
    for axis in axes:
        curves = _curves(part, axis)
        if curves is None:
            continue
        rows = curves.groupby("curve", sort=False)
        first, last = rows.first(), rows.last()
        long = (last["least"] >= FLAT_LEAST) & (first["least"] > 0) & (first["least"] * 10 <= last["least"])
        flat = long & (last["seconds"] < FLAT_GROWTH * first["seconds"])
        if long.sum() >= SHARED:
            worst = max(worst, (float(flat.sum() / long.sum()), int(flat.sum()), axis))
    share, count, axis = worst
    if share <= FLAT_SHARE:
        return None
    return "flat", True, f"in {count:,} curves over {axis} ({share:.0%}) time does not double while work grows tenfold"


def _falling(part: "pd.DataFrame", axes: tuple[str, ...]) -> Found:
    worst: tuple[float, str] = (0.0, "")
    for axis in axes:
        curves = _curves(part, axis)
        if curves is None:
            continue
        later = curves.iloc[::-1].groupby("curve", sort=False)["seconds"].cummin().iloc[::-1]
        worst = max(worst, (float((curves["seconds"] > FALL * later).mean()), axis))
    share, axis = worst
    if share <= FALL_SHARE:
        return None
    return "falling", True, f"{share:.0%} of the points took over {FALL} times what a later one of more {axis} took"


def _curves(part: "pd.DataFrame", axis: str) -> "pd.DataFrame | None":
    """Rows in the order of their curves over ``axis``, with the number of the curve; only of three points and more."""
    if axis not in part or part[axis].nunique() < 3:
        return None
    key = [name for name in part.columns if name not in (axis, "seconds", "source", "origin", "least")]
    rows = part.assign(curve=part.groupby(key, sort=False).ngroup()).sort_values(["curve", axis])
    long = rows["curve"].map(rows["curve"].value_counts()) >= 3
    return rows[long] if long.any() else None


def _slow(part: "pd.DataFrame") -> Found:
    big = part[part["least"] >= FLAT_LEAST]
    if len(big) < SHARED:
        return None
    ratio = float((big["seconds"] / big["least"]).median())
    return ("slow", True, f"large shapes take {ratio:.0f} times the least that they can") if ratio > SLOW else None


def _faster_under_skew(part: "pd.DataFrame") -> Found:
    """Shapes whose experts take less time under uneven routing, of large batches over several ranks."""
    rows = part[(part["tokens"] >= SKEW_TOKENS) & (part["ep"] >= SKEW_EP)]
    even = _best(rows[rows["routing"].isin(["balanced", "uniform"])]).drop(columns="routing")
    uneven = _best(rows[~rows["routing"].isin(["balanced", "uniform"])])
    on = [name for name in even.columns if name != "seconds"]
    both = uneven.merge(even, on=on)
    if both.empty:
        return None
    both["ratio"] = both["seconds_x"] / both["seconds_y"]
    shapes = both.groupby(["hidden", "ffn", "top_k", "experts"])["ratio"].median().sort_values()
    odd = shapes[shapes < SKEW]
    if odd.empty:
        return None
    named = ", ".join(
        f"{row.hidden}x{row.ffn}, {row.top_k} of {row.experts}: {row.ratio:.2f}"
        for row in odd.head(_TOLD).reset_index().itertuples()
    )
    text = (
        f"uneven routing is faster than even in {len(odd)} of {len(shapes)} shapes ({named}):"
        " not comparable with other engines there"
    )
    return "faster under skew", False, text

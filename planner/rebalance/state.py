"""A watcher as arrays, and back: what a restart needs to go on where it was."""

# L layers, E experts, B batches, K powers

from collections.abc import Mapping

import numpy as np

from ...solvers.drift import POWERS, DriftTest, Reference
from .watcher import RENEWED, Rules, Watcher


def pack(watcher: Watcher) -> dict[str, np.ndarray]:
    """Everything but the rules."""
    loads, test = watcher.loads, watcher.test
    batches = loads.stacked() if loads.batches else np.empty((0, *loads.pending.shape))
    found = {
        "times": np.array([when for when, _ in loads.batches], float),
        "batches": batches,
        "pending": loads.pending,
        "decayed": loads.decayed,
        "last": np.array([loads.last]),
        "seen": np.array([watcher.seen]),
    }
    if test is not None:
        found |= {"share": test.reference.share, "overdispersion": test.reference.overdispersion}
        found |= {"known": np.array(test.known), "wealth": test.wealth, "growth": test.growth, "onset": test.onset}
        found |= {"looks": np.array([test.looks])}
    return found


def unpack(arrays: Mapping[str, np.ndarray], rules: Rules, layers: int, experts: int) -> Watcher:
    """The watcher that ``pack`` was given, under these rules. Raises ValueError, naming the array, where it is none."""
    watcher, cells = Watcher(rules, layers, experts), (layers, experts)
    loads, known = watcher.loads, arrays.get("times", np.empty(0))
    count = len(known) if known.ndim == 1 else 0
    times, batches = _floats(arrays, "times", (count,)), _floats(arrays, "batches", (count, *cells))
    for when, counts in zip(times.tolist(), batches, strict=True):
        loads.batches.append((when, counts))
    loads.pending, loads.decayed = _floats(arrays, "pending", cells), _floats(arrays, "decayed", cells)
    loads.last = float(_floats(arrays, "last", (1,))[0])
    watcher.seen = int(_floats(arrays, "seen", (1,))[0])
    if "looks" in arrays:
        watcher.test = _test(arrays, rules, cells)
    return watcher


def _test(arrays: Mapping[str, np.ndarray], rules: Rules, cells: tuple[int, int]) -> DriftTest:
    powers, known = (len(POWERS),), arrays.get("known", np.empty(0))
    if known.ndim != 1 or not 1 <= len(known) <= RENEWED + rules.most:
        raise ValueError(f"known: a list of {list(known.shape)} scores")
    share, overdispersion = _floats(arrays, "share", cells), _floats(arrays, "overdispersion", cells[:1])
    if not (share > 0).all() or (overdispersion > 1).any():
        raise ValueError("share or overdispersion: expected numbers from 0 to 1")
    return DriftTest(
        Reference(share, overdispersion),
        rules.between,
        sorted(_floats(arrays, "known", known.shape).tolist()),
        _floats(arrays, "wealth", powers),
        _floats(arrays, "growth", powers),
        _floats(arrays, "onset", powers).astype(np.int64),
        int(_floats(arrays, "looks", (1,))[0]),
    )


def _floats(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A copy of an array of this shape, of finite numbers from 0."""
    value = arrays.get(name)
    if value is None or value.shape != shape or value.dtype.kind not in "iuf":
        got = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
        raise ValueError(f"{name}: expected numbers {list(shape)}, got {got}")
    if not np.isfinite(value).all() or (value < 0).any():
        raise ValueError(f"{name}: expected finite numbers from 0")
    return value.astype(float)

"""A watcher as arrays, and back: what a restart needs to go on where it was."""

# L layers, E experts, B batches, K powers

from collections.abc import Mapping

import numpy as np

from ...solvers.drift import POWERS, SCALES, DriftTest, Reference, ScaleTest
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
        found |= {"test_pending": test.pending, "test_held": test.held}
        for number, one in enumerate(test.tests):
            mine = {"share": one.reference.share, "overdispersion": one.reference.overdispersion}
            mine |= {"known": np.array(one.known), "looks": np.array([one.looks])}
            mine |= {"wealth": one.wealth, "growth": one.growth, "onset": one.onset}
            found |= {f"test{number}_{name}": value for name, value in mine.items()}
    return found


def unpack(arrays: Mapping[str, np.ndarray], rules: Rules, layers: int, experts: int) -> Watcher:
    """The watcher that ``pack`` was given, under these rules. Raises ValueError, naming the array, where it is none."""
    watcher, cells = Watcher(rules, layers, experts), (layers, experts)
    loads, count = watcher.loads, len(arrays["times"]) if np.ndim(arrays.get("times")) == 1 else 0
    times, batches = _floats(arrays, "times", (count,)), _floats(arrays, "batches", (count, *cells))
    for when, counts in zip(times.tolist(), batches, strict=True):
        loads.batches.append((when, counts))
    loads.pending, loads.decayed = _floats(arrays, "pending", cells), _floats(arrays, "decayed", cells)
    loads.last = float(_floats(arrays, "last", (1,))[0])
    watcher.seen = int(_floats(arrays, "seen", (1,))[0])
    if "test_held" in arrays:
        number = np.size(arrays["test_held"])
        if not 1 <= number <= len(SCALES):
            raise ValueError(f"test_held: {number} scales, expected 1 to {len(SCALES)}")
        held = _floats(arrays, "test_held", (number,)).astype(np.int64)
        if (held >= SCALES[:number]).any():
            raise ValueError("test_held: more batches than the scales")
        tests = [_scale_test(arrays, f"test{n}_", cells, 2 * RENEWED + rules.most) for n in range(number)]
        watcher.test = DriftTest(rules.between, tests, _floats(arrays, "test_pending", (number, *cells)), held)
    return watcher


def _scale_test(arrays: Mapping[str, np.ndarray], name: str, cells: tuple[int, int], most: int) -> ScaleTest:
    """One scale's; most: scores that it may hold."""
    powers, known = (len(POWERS),), arrays.get(f"{name}known", np.empty(0))
    if known.ndim != 1 or not 1 <= len(known) <= most:
        raise ValueError(f"{name}known: a list of {list(known.shape)} scores")
    reference = Reference(
        _floats(arrays, f"{name}share", cells), np.minimum(_floats(arrays, f"{name}overdispersion", cells[:1]), 1.0)
    )
    if not (reference.share > 0).all():
        raise ValueError(f"{name}share: expected numbers above 0")
    return ScaleTest(
        reference,
        sorted(_floats(arrays, f"{name}known", known.shape).tolist()),
        _floats(arrays, f"{name}wealth", powers),
        _floats(arrays, f"{name}growth", powers),
        _floats(arrays, f"{name}onset", powers).astype(np.int64),
        int(_floats(arrays, f"{name}looks", (1,))[0]),
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

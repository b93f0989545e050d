"""What times the experts of all layers under a placement: a table of a GPU, or a measured cluster."""

# W windows, B batches, L layers, E experts, G devices

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ...spec.model import Model
from ...spec.placement import PlacementLayer
from ...spec.trace import Trace
from ...spec.workload import Workload
from ..place.timed import Timing
from .imbalance import Loads, Phase, batch_counts, loads
from .kernel import KernelTable

BATCHES = 8  # of each window
STEPS = 2  # the same on a measured cluster, whose times take longer to predict
MODEL_NOISE = 0.2
"""Of the way in which times of uneven loads are read from even rows, as a standard deviation of logarithms between
places of the curve that are a factor of two apart: with it nine of ten measured pairs of one type of GPU, H100, lie in
the 90 % interval (benchmarks/results/advise.md judges it on the others)."""


class Timer(Protocol):
    """Seconds of steps of ``tokens`` tokens drawn from windows of a trace, and what is known of their error."""

    @property
    def noise(self) -> float:
        """Standard deviation of logarithms of times."""
        ...

    @property
    def described(self) -> str:
        """Where times come from."""
        ...

    def seconds(
        self, layers: Sequence[PlacementLayer], windows: Sequence[Trace], tokens: int, phase: Phase, seed: int
    ) -> np.ndarray:
        """[W, B] of the experts of all layers."""
        ...

    def even(self, windows: Sequence[Trace], tokens: int, phase: Phase, seed: int, held: int) -> float | None:
        """Mean seconds if every device of every layer had the mean load, with ``held`` experts; None: not known."""
        ...


@dataclass(frozen=True, eq=False)
class TableTimer:
    """By measured rows of a GPU. A layer takes as long as its slowest device; exchanges between devices not counted."""

    table: KernelTable
    devices: int

    @property
    def noise(self) -> float:
        """Of rows and of their reading."""
        return float(np.hypot(self.table.noise, MODEL_NOISE))

    @property
    def described(self) -> str:
        return self.table.origin

    def seconds(
        self, layers: Sequence[PlacementLayer], windows: Sequence[Trace], tokens: int, phase: Phase, seed: int
    ) -> np.ndarray:
        return np.stack([self._of(found, layers) for found in counted(windows, tokens, phase, seed)])

    def even(self, windows: Sequence[Trace], tokens: int, phase: Phase, seed: int, held: int) -> float | None:
        total = []
        for counts in counted(windows, tokens, phase, seed):
            pairs = counts.sum(axis=2) / self.devices  # [B, L]
            active = np.minimum(held, (counts > 0).sum(axis=2) / self.devices)
            total.append(self.table.seconds(pairs, active, held).sum(axis=1))
        return float(np.mean(total))

    def _of(self, counts: np.ndarray, layers: Sequence[PlacementLayer]) -> np.ndarray:
        """[B] of one window's batches; counts: [B, L, E]."""
        found = loads(counts, layers)
        held = max(len(experts) for experts in layers[0].slots)
        return self.table.seconds(found.pairs, found.active, held).max(axis=2).sum(axis=1)


@dataclass(frozen=True, eq=False)
class ClusterTimer:
    """By the curves of a measured cluster: dispatch, experts and combine, as `moeplan place --cluster` times them."""

    timing: Timing

    noise: float = MODEL_NOISE
    timings: dict[tuple[int, Phase, int], Timing] = field(default_factory=dict)  # with the curves that they have read

    @property
    def described(self) -> str:
        return "measured cluster: dispatch, experts and combine"

    def seconds(
        self, layers: Sequence[PlacementLayer], windows: Sequence[Trace], tokens: int, phase: Phase, seed: int
    ) -> np.ndarray:
        drawn = [self._of(tokens, phase, seed + b) for b in range(STEPS)]
        return np.array([[timing.seconds(layers, window) for timing in drawn] for window in windows])

    def even(self, windows: Sequence[Trace], tokens: int, phase: Phase, seed: int, held: int) -> float | None:
        return None

    def _of(self, tokens: int, phase: Phase, seed: int) -> Timing:
        asked = (tokens, phase, seed)
        if asked not in self.timings:
            t = self.timing
            self.timings[asked] = Timing(t.cluster, t.model, workload_of(tokens, phase), t.dtype, seed, t.asked)
        return self.timings[asked]


def workload_of(tokens: int, phase: Phase) -> Workload:
    """A step of so many tokens; prompts as long as ``Workload`` has them where they divide."""
    if phase == "decode":
        return Workload.from_text(f"decode:{tokens}")
    return Workload.from_text(
        f"prefill:{tokens}" if tokens % 128 == 0 or tokens < 128 else f"prefill:{tokens}@{tokens}"
    )


def counted(windows: Sequence[Trace], tokens: int, phase: Phase, seed: int) -> list[np.ndarray]:
    """[W] of [B, L, E] pairs of the batches of each window; the same for every placement."""
    return [batch_counts(window, tokens, BATCHES, phase, seed + 1000 * w) for w, window in enumerate(windows)]


def hottest(layers: Sequence[PlacementLayer], windows: Sequence[Trace], tokens: int, phase: Phase, seed: int) -> float:
    """Pairs of the busiest device over the mean, mean over layers and batches."""
    found: list[Loads] = [loads(counts, layers) for counts in counted(windows, tokens, phase, seed)]
    return float(np.mean([each.hottest.mean() for each in found]))


def expert_sizes(model: Model) -> list[int]:
    """[L] bytes of one expert of each layer as stored."""
    return [model.expert_bytes(ordinal) for ordinal in range(len(model.moe_layers))]

"""Who holds which tokens and sequences of a step, for all devices; the rule is ``spec.layout``."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..spec.layout import even, last_counts, tokens_of
from ..spec.workload import Workload


@dataclass(frozen=True)
class Layout:
    """Groups of ``tensor`` consecutive devices own whole consecutive sequences; tokens are sequence-major.

    sequences: per group; tokens: per device, those of a group's sequences divided over its devices.
    """

    workload: Workload
    tensor: int
    sequences: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def of(cls, workload: Workload, tensor: int, sequences: tuple[int, ...]) -> "Layout":
        """Tokens of a group divided evenly over its devices, the remainder to the first."""
        return cls(workload, tensor, tuple(sequences), tokens_of(sequences, workload.length, tensor))

    def chunks(self, count: int) -> list["Layout"]:
        """Every device's tokens in so many parts."""
        parts = zip(*(even(tokens, count) for tokens in self.tokens), strict=True)
        return [replace(self, tokens=tokens) for tokens in parts]

    @property
    def devices(self) -> int:
        return len(self.tokens)

    @cached_property
    def source(self) -> np.ndarray:
        """[tokens] device that holds each token."""
        return np.repeat(np.arange(self.devices), self.tokens)

    @cached_property
    def last_counts(self) -> tuple[int, ...]:
        """Per device, sequences whose last token it holds."""
        return tuple(last_counts(self.tokens, self.workload.length))

    def group(self, device: int) -> tuple[int, ...]:
        first = device - device % self.tensor
        return tuple(range(first, first + self.tensor))

    def groups(self) -> list[tuple[int, ...]]:
        return [self.group(first) for first in range(0, self.devices, self.tensor)]

"""Who holds which tokens and sequences of a step; the same rule as the runtime's."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

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
        tokens: list[int] = []
        for count in sequences:
            each, more = divmod(count * workload.length, tensor)
            tokens += [each + (member < more) for member in range(tensor)]
        return cls(workload, tensor, tuple(sequences), tuple(tokens))

    @property
    def devices(self) -> int:
        return len(self.tokens)

    @cached_property
    def source(self) -> np.ndarray:
        """[tokens] device that holds each token."""
        return np.repeat(np.arange(self.devices), self.tokens)

    @cached_property
    def last_counts(self) -> tuple[int, ...]:
        """Per device, sequences whose last token it holds: the rows that the head computes."""
        ends = np.cumsum((0, *self.tokens)) // self.workload.length
        return tuple(np.diff(ends).tolist())

    def group(self, device: int) -> tuple[int, ...]:
        first = device - device % self.tensor
        return tuple(range(first, first + self.tensor))

    def groups(self) -> list[tuple[int, ...]]:
        return [self.group(first) for first in range(0, self.devices, self.tensor)]

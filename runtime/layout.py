"""Which tokens of a step each device holds, seen from one of them; the rule is ``spec.layout``."""

from dataclasses import dataclass
from functools import cached_property

from ..spec import Plan
from ..spec.layout import last_counts, tokens_of
from .attention import Batch


@dataclass(frozen=True)
class Layout:
    """A step seen from ``rank``; ``sequences`` counts those of each group, ``length`` the new tokens of each."""

    rank: int
    tensor: int
    tokens: tuple[int, ...]
    sequences: tuple[int, ...]
    length: int

    @classmethod
    def of(cls, plan: Plan, rank: int) -> "Layout":
        return cls(rank, plan.degrees.tensor, plan.tokens, plan.sequences, plan.workload.length)

    def decode(self) -> "Layout":
        """The step that goes on with one token per sequence."""
        return self.of_length(1)

    def of_length(self, length: int) -> "Layout":
        """A step of ``length`` new tokens per sequence: each group's tokens evenly over its devices."""
        tokens = tokens_of(self.sequences, length, self.tensor)
        return Layout(self.rank, self.tensor, tokens, self.sequences, length)

    @property
    def group(self) -> int:
        return self.rank // self.tensor

    @cached_property
    def first(self) -> int:
        """Number of this device's first token."""
        return sum(self.tokens[: self.rank])

    @cached_property
    def own(self) -> slice:
        """This device's tokens."""
        return slice(self.first, self.first + self.tokens[self.rank])

    @cached_property
    def group_tokens(self) -> tuple[int, ...]:
        """Tokens of each device of this device's group."""
        return self.tokens[self.group * self.tensor : (self.group + 1) * self.tensor]

    @cached_property
    def group_sequences(self) -> tuple[int, int]:
        """Range of the sequences that the group owns."""
        first = sum(self.sequences[: self.group])
        return first, first + self.sequences[self.group]

    def batch(self, context: int) -> Batch:
        """What the group's attention computes."""
        return Batch(self.sequences[self.group], self.length, context)

    @cached_property
    def last_rows(self) -> list[int]:
        """Of this device's rows, those that hold the last token of a sequence."""
        return [row for row in range(self.tokens[self.rank]) if (self.first + row + 1) % self.length == 0]

    @cached_property
    def last_counts(self) -> list[int]:
        """Sequences whose last token each device holds, for all devices."""
        return last_counts(self.tokens, self.length)

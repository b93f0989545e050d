"""Who holds which tokens of a step: the one rule that the planner predicts by and the runtime executes.

Tokens are numbered sequence-major over the whole step: t = sequence * length + position. Every ``tensor`` consecutive
devices form a group that owns whole consecutive sequences and divides their tokens evenly.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise


def even(units: int, parts: int) -> tuple[int, ...]:
    """As equal as whole numbers allow, the larger parts first."""
    each, more = divmod(units, parts)
    return tuple(each + (part < more) for part in range(parts))


def tokens_of(sequences: Sequence[int], length: int, tensor: int) -> tuple[int, ...]:
    """Tokens of each device, where each group owns so many sequences of ``length`` new tokens."""
    return tuple(held for count in sequences for held in even(count * length, tensor))


def last_counts(tokens: Sequence[int], length: int) -> list[int]:
    """Sequences whose last token each device holds: the rows that the head computes."""
    ends = accumulate(tokens, initial=0)
    return [after // length - before // length for before, after in pairwise(ends)]

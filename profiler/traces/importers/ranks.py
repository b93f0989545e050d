"""Which ranks of one recording saw the same tokens.

Under tensor parallelism every rank sees every token, under attention data parallelism each its own. The files do not
say which: two ranks are copies if they agree on every forward pass that both recorded.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from ....spec.errors import DocumentError
from .records import ranges


@dataclass(frozen=True)
class Record:
    """What one rank recorded of one forward pass.

    values: ids [T, L, K] or counts [L, E]. identity: what a copy on another rank agrees in; empty if it saw nothing.
    lengths: [sequences] tokens; decoding: whether tokens are without their request.
    """

    forward_pass: int
    rank: int
    key: str
    values: np.ndarray
    identity: bytes
    lengths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    decoding: bool = False


def merge_ranks(records: list[Record], where: str, notes: list[str]) -> list[Record]:
    """Every token once, in order of passes, then ranks; says what was taken for a copy."""
    by_rank: dict[int, dict[tuple[int, str], Record]] = defaultdict(dict)
    repeated = 0
    for record in records:
        own, slot = by_rank[record.rank], (record.forward_pass, record.key)
        if slot in own:
            if own[slot].identity != record.identity or not np.array_equal(own[slot].values, record.values):
                raise DocumentError(
                    f"{where}: rank {record.rank} has two different records of forward pass {record.forward_pass}: "
                    "import one recording at a time"
                )
            repeated += 1
        own[slot] = record
    if repeated:
        notes.append(f"{repeated} records found twice (a file copied): counted once")
    kept: dict[int, dict[tuple[int, str], Record]] = {}
    copies: dict[int, list[int]] = defaultdict(list)
    for rank in sorted(by_rank):
        own = by_rank[rank]
        original = next((first for first, other in kept.items() if _copies(own, other)), None)
        if original is None:
            kept[rank] = dict(own)
        else:
            copies[original].append(rank)
            kept[original] = own | kept[original]
    for original, others in copies.items():
        plural = "s" if len(others) > 1 else ""
        notes.append(
            f"rank{plural} {ranges(others)}: the same tokens as rank {original} (tensor parallelism): counted once"
        )
    if len(kept) > 1:
        notes.append(f"ranks {ranges(list(kept))} saw different tokens (attention data parallelism): joined")
    merged = [(slot, rank, record) for rank, own in kept.items() for slot, record in own.items()]
    return [record for _, _, record in sorted(merged, key=lambda item: item[:2])]


def _copies(own: dict[tuple[int, str], Record], other: dict[tuple[int, str], Record]) -> bool:
    common = [slot for slot in own if slot in other and (own[slot].identity or other[slot].identity)]
    return bool(common) and all(own[slot].identity == other[slot].identity for slot in common)

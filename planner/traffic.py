"""Bytes between the members of a group, for a batch of exchanges at once: only the flows that carry anything."""

# B exchanges, n members, F flows

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Traffic:
    """Flows of a batch of exchanges among ``members`` devices, indexed by position in their group.

    batch, source, target, bytes: [F]; every flow carries something to another member, every pair at most once.
    """

    count: int
    members: int
    batch: np.ndarray
    source: np.ndarray
    target: np.ndarray
    bytes: np.ndarray

    @classmethod
    def of(cls, sizes: np.ndarray) -> "Traffic":
        """From [B, source, target] bytes; what a member sends itself is free."""
        carries = (sizes > 0) & ~np.eye(sizes.shape[1], dtype=bool)
        batch, source, target = np.nonzero(carries)
        return cls(len(sizes), sizes.shape[1], batch, source, target, sizes[carries].astype(float))

    @classmethod
    def outward(cls, own: np.ndarray) -> "Traffic":
        """Every member sends its own [B, n] bytes to every other, each copy by itself."""
        return cls.of(np.repeat(own[:, :, None], own.shape[1], axis=2))

    @classmethod
    def inward(cls, own: np.ndarray) -> "Traffic":
        """Every member receives its own [B, n] bytes from every other."""
        return cls.of(np.repeat(own[:, None, :], own.shape[1], axis=1))

    def back(self) -> "Traffic":
        """Every flow turned round."""
        return Traffic(self.count, self.members, self.batch, self.target, self.source, self.bytes)

    def times(self, factor: float) -> "Traffic":
        return Traffic(self.count, self.members, self.batch, self.source, self.target, self.bytes * factor)

    def only(self, index: int) -> "Traffic":
        """One exchange by itself."""
        mine = self.batch == index
        batch = np.zeros(int(mine.sum()), int)
        return Traffic(1, self.members, batch, self.source[mine], self.target[mine], self.bytes[mine])

    def sent(self, flows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """[B, n] bytes that each member sends over these flows."""
        return self._sum(self.source, flows)

    def received(self, flows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """[B, n] bytes that each member receives over these flows."""
        return self._sum(self.target, flows)

    def across(self, host: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[B, n] bytes that each member sends to, and receives from, other hosts; host: [n]."""
        flows = host[self.source] != host[self.target]
        return self.sent(flows), self.received(flows)

    def between(self, of: np.ndarray) -> np.ndarray:
        """[parts, parts] bytes between parts of the members; of: [n] part of each member."""
        parts = int(of.max()) + 1
        key = of[self.source] * parts + of[self.target]
        return np.bincount(key, self.bytes, parts * parts).reshape(parts, parts)

    def sizes(self, index: int) -> np.ndarray:
        """[source, target] bytes of one exchange."""
        dense = np.zeros((self.members, self.members))
        mine = self.batch == index
        dense[self.source[mine], self.target[mine]] = self.bytes[mine]
        return dense

    def _sum(self, member: np.ndarray, flows: slice | np.ndarray) -> np.ndarray:
        place = self.batch[flows] * self.members + member[flows]
        total = np.bincount(place, self.bytes[flows], self.count * self.members)
        return total.reshape(self.count, self.members)

"""Traffic of large groups without a list of its flows: what members exchange has the form of a product.

Member s sends a[s] c[t] bytes to member t, by one pair of factors between hosts and by another inside them. Then the
largest message of a member is a[s] times the largest c of another host, and so on: everything that ``FlowModel`` asks
for takes steps in proportion to the members, not to their pairs. Hosts have equally many consecutive members.
"""

# B exchanges, n members, H hosts

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Factors(NamedTuple):
    """a, c: [B, n] of what members send and receive; flows with both above 0 exist. out, into: [B, n] their sums."""

    a: np.ndarray
    c: np.ndarray
    out: np.ndarray
    into: np.ndarray

    def times(self, factor: float) -> "Factors":
        return Factors(self.a * factor, self.c, self.out * factor, self.into * factor)

    def back(self) -> "Factors":
        return Factors(self.c, self.a, self.into, self.out)

    def only(self, index: int) -> "Factors":
        return Factors(*(values[index : index + 1] for values in self))


@dataclass(frozen=True)
class Spread:
    """Flows of a batch of exchanges between hosts (far) and inside them (near).

    cell: [n], members of a host with the same number exchange nothing; hosts: how many.
    """

    far: Factors
    near: Factors
    cell: np.ndarray
    hosts: int

    @classmethod
    def of(cls, a: np.ndarray, c: np.ndarray, hosts: int) -> "Spread":
        """Every member s sends every other member t a[s] c[t] bytes."""
        own_a, own_c = on_host(a, hosts), on_host(c, hosts)
        all_a, all_c = a.sum(1, keepdims=True), c.sum(1, keepdims=True)
        far = Factors(a, c, a * (all_c - own_c), c * (all_a - own_a))
        return cls(far, Factors(a, c, a * (own_c - c), c * (own_a - a)), np.arange(a.shape[1]), hosts)

    @property
    def count(self) -> int:
        return len(self.far.a)

    @property
    def members(self) -> int:
        return self.far.a.shape[1]

    def sent(self) -> np.ndarray:
        """[B, n] bytes that each member sends."""
        return self.near.out + self.far.out

    def received(self) -> np.ndarray:
        """[B, n] bytes that each member receives."""
        return self.near.into + self.far.into

    def across(self, host: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[B, n] bytes that each member sends to, and receives from, other hosts."""
        return self.far.out, self.far.into

    def back(self) -> "Spread":
        """Every flow turned round."""
        return Spread(self.far.back(), self.near.back(), self.cell, self.hosts)

    def times(self, factor: float) -> "Spread":
        return Spread(self.far.times(factor), self.near.times(factor), self.cell, self.hosts)

    def only(self, index: int) -> "Spread":
        """One exchange by itself."""
        return Spread(self.far.only(index), self.near.only(index), self.cell, self.hosts)

    def between(self, of: np.ndarray) -> np.ndarray:
        """[parts, parts] bytes between parts of the members; of: [n] part of each member."""
        parts, host = int(of.max()) + 1, np.arange(self.members) * self.hosts // self.members
        cell = np.unique(np.stack([host, self.cell]), axis=1, return_inverse=True)[1].ravel()
        total = np.zeros((parts, parts))
        for a, c in zip(self.far.a, self.far.c, strict=True):  # every pair but those of one host
            total += np.outer(np.bincount(of, a, parts), np.bincount(of, c, parts)) - _inside(of, host, a, c)
        for a, c in zip(self.near.a, self.near.c, strict=True):  # those, but for those of one cell
            total += _inside(of, host, a, c) - _inside(of, cell, a, c)
        return np.maximum(total, 0.0)


def _inside(of: np.ndarray, where: np.ndarray, a: np.ndarray, c: np.ndarray) -> np.ndarray:
    """[parts, parts] sums of a[s] c[t] over members s and t at one place; where: [n] place of each member."""
    parts, places = int(of.max()) + 1, int(where.max()) + 1
    key = where * parts + of
    sent, received = (np.bincount(key, values, places * parts).reshape(places, parts) for values in (a, c))
    return sent.T @ received


def blocks(host: np.ndarray) -> bool:
    """Whether hosts have equally many consecutive members; host: [n] of each member."""
    hosts = len(np.unique(host))
    each = len(host) // hosts
    return bool(each * hosts == len(host) and (host.reshape(hosts, each) == host[::each, None]).all())


def on_host(values: np.ndarray, hosts: int) -> np.ndarray:
    """[B, n] the sum over each member's host."""
    by_host = values.reshape(len(values), hosts, -1)
    return np.broadcast_to(by_host.sum(2, keepdims=True), by_host.shape).reshape(values.shape)


def elsewhere(values: np.ndarray, hosts: int) -> np.ndarray:
    """[B, n] largest of [B, n] values of 0 or more over the members of all other hosts."""
    largest = values.reshape(len(values), hosts, -1).max(2)
    other = _other(largest[:, None, :], np.arange(hosts)[None, :])[:, 0]
    return np.repeat(other, values.shape[1] // hosts, axis=1)


def beside(values: np.ndarray, cell: np.ndarray, hosts: int) -> np.ndarray:
    """[B, n] largest of [B, n] values of 0 or more over the members of the same host in other cells."""
    return _other(values.reshape(len(values), hosts, -1), cell.reshape(hosts, -1)).reshape(values.shape)


def _other(values: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """[B, H, m] the largest of each row's values in another cell; cell: [H, m]."""
    first = values.argmax(2)  # [B, H]
    top = np.take_along_axis(values, first[:, :, None], 2)
    its = cell[np.arange(len(cell))[None, :], first][:, :, None]
    same = cell[None] == its
    second = np.where(same, 0.0, values).max(2, keepdims=True)
    return np.where(same, second, top)

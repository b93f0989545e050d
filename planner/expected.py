"""The same as ``choices`` where a step has too many tokens to count one by one: expected numbers, from a sample.

Every device's tokens are taken to choose as the sample does on average, so that its rows are its tokens times a
probability: with p[e] that a token chooses expert e, and q[j] that it needs what lies at place j of every group of
devices (one row, however many of its experts lie there). Which copy serves is the rule of ``Copies``: the own device's,
else the own host's evenly, else all evenly. Real counts vary about the expected ones by about their square root.
"""

# B layers that are costed together, S sampled tokens, K top-k, G devices, H hosts, E experts, d devices of a group

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ..solvers.placement.fan_out import expert_sets
from ..spec.errors import MoeplanError
from ..spec.plan import LayerPlan
from .choices import Dispatch, Forward, Known, Rows, counted, owner_of, period, remembered
from .layout import Layout
from .spread import Factors, Spread, blocks
from .traffic import Traffic

ROUNDING = 1e-9  # of a probability
LISTED = 256  # devices up to which all pairs are listed


@dataclass(frozen=True)
class Expected:
    """ids: [B, S, K] expert of every choice of the sample; hosts: [G]."""

    ids: np.ndarray
    layout: Layout
    hosts: np.ndarray
    experts: int
    _known: Known[Dispatch] = field(default_factory=dict)

    def chunks(self, count: int) -> list["Expected"]:
        """Those of each chunk of every device's tokens."""
        return [Expected(self.ids, layout, self.hosts, self.experts) for layout in self.layout.chunks(count)]

    @cached_property
    def _tokens(self) -> np.ndarray:
        """[G]"""
        return np.array(self.layout.tokens, float)

    @cached_property
    def _chosen(self) -> np.ndarray:
        """[B, E] probability that a token chooses each expert."""
        return counted(self.ids, self.experts) / self.ids.shape[1]

    @cached_property
    def own(self) -> Rows:
        """Tokens of each device that chose each expert."""
        number, of = np.unique(self._tokens, return_inverse=True)
        return Rows(number[:, None] * self._chosen[:, None, :], of)

    @cached_property
    def total(self) -> np.ndarray:
        """[B, E] tokens that chose each expert."""
        return self._tokens.sum() * self._chosen

    def dispatch(self, plans: Sequence[LayerPlan]) -> Dispatch:
        """One plan for each of the B layers; remembered, as long as few devices make it small."""
        return remembered(self._known, self.layout.devices, plans, self._dispatch)

    def forward(self, plans: Sequence[LayerPlan]) -> Forward:
        """Not foreseen: raises MoeplanError."""
        raise MoeplanError("strategy hierarchical is predicted token by token: give a step of fewer tokens")

    def _dispatch(self, plans: Sequence[LayerPlan]) -> Dispatch:
        sizes = {period(plan, self.experts) for plan in plans}
        size = sizes.pop()
        if sizes or not size:
            raise MoeplanError(
                "placements with copies other than in equal groups of devices are predicted token by token: "
                "give a step of fewer tokens"
            )
        place = np.stack([owner_of(plan.slots[:size], self.experts) for plan in plans])
        served = _Served.of(self._tokens, self.hosts, size)
        needed = self._needed(place, size)
        lies = np.arange(self.layout.devices) % size
        holds = place[:, None, :] == np.arange(size)[:, None]  # [B, d, E]
        # Devices at one place that serve equally many tokens are alike.
        alike = np.stack([lies, served.tokens])
        kinds, of = np.unique(alike, axis=1, return_inverse=True)
        counts = kinds[1][:, None] * np.where(holds[:, kinds[0].astype(int)], self._chosen[:, None, :], 0.0)
        kept = self._tokens * needed[:, lies]
        if blocks(self.hosts):
            rows: Traffic | Spread = served.rows(self._tokens, needed)
        else:
            rows = self._listed(served, needed[:, lies])
        return Dispatch(rows, rows.back(), kept, Rows(counts, of.ravel()))

    def _listed(self, served: "_Served", needed: np.ndarray) -> Traffic:
        """Rows between all pairs of devices, where hosts are too uneven for products; needed: [B, G] by receiver."""
        devices = self.layout.devices
        if devices > LISTED:
            raise MoeplanError(
                "hosts with unequal or scattered devices: steps of so many tokens are planned for at most "
                f"{LISTED} devices on such hosts, not {devices}: give a step of fewer tokens"
            )
        lies = np.arange(devices) % served.size
        near = served.here[self.hosts][:, lies]  # [source, target] copies of the target's place on the source's host
        same = self.hosts[:, None] == self.hosts
        part = np.where(near > 0, same / np.maximum(near, 1), served.size / devices)
        part[lies[:, None] == lies] = 0.0  # what a device holds itself stays
        return Traffic.of(self._tokens[:, None] * part * needed[:, None, :])

    def _needed(self, place: np.ndarray, size: int) -> np.ndarray:
        """[B, d] probability that a token needs what lies at each place."""
        layer, members, tokens = self._sets
        where = np.where(members < 0, -1, place.astype(np.int16)[layer, members])  # [K, N]; -1: an identity expert
        needed = np.zeros(len(place) * size)
        for k, here in enumerate(where):
            first = here >= 0  # and no earlier expert of the token lies there
            for earlier in where[:k]:
                first &= here != earlier
            needed += np.bincount(layer[first] * size + here[first], tokens[first], len(needed))
        return needed.reshape(-1, size) / self.ids.shape[1]

    @cached_property
    def _sets(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[N] layer, [K, N] experts and [N] tokens of every set that tokens choose: equal ones need the same places."""
        sets = expert_sets(self.ids.transpose(1, 0, 2))
        layer = np.repeat(np.arange(len(sets)), [len(tokens) for _, tokens in sets])
        members = np.ascontiguousarray(np.concatenate([members for members, _ in sets]).T)
        return layer, members, np.concatenate([tokens for _, tokens in sets])


@dataclass(frozen=True)
class _Served:
    """Whose tokens a device serves for its place, in groups of d devices.

    size: d; hosts: [G]; here: [H, d] copies of each place on each host; waiting: [H, d] tokens of a host's devices that
    lie at another place; far: [d] tokens of the hosts without a copy; tokens: [G] that each device serves, its own, its
    host's and other hosts'.
    """

    size: int
    hosts: np.ndarray
    here: np.ndarray
    waiting: np.ndarray
    far: np.ndarray
    tokens: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, hosts: np.ndarray, size: int) -> "_Served":
        devices, count = len(tokens), int(hosts.max()) + 1
        place = np.arange(devices) % size
        cell = hosts * size + place
        here = np.bincount(cell, minlength=count * size).reshape(count, size)
        held = np.bincount(cell, tokens, count * size).reshape(count, size)
        waiting = np.bincount(hosts, tokens, count)[:, None] - held
        far = np.where(here == 0, waiting, 0.0).sum(0)
        near = np.where(here > 0, waiting / np.maximum(here, 1), 0.0)
        served = tokens + near[hosts, place] + far[place] / (devices // size)
        return cls(size, hosts, here, waiting, far, served)

    def rows(self, tokens: np.ndarray, needed: np.ndarray) -> Spread:
        """Rows between devices; tokens: [G], needed: [B, d]."""
        place, groups = np.arange(len(tokens)) % self.size, len(tokens) // self.size
        each = needed[:, place]  # [B, G]
        inside = (needed @ (self.here > 0).T)[:, self.hosts] - each
        outside = needed.sum(1, keepdims=True) - inside - each
        outside = np.where(outside > ROUNDING, outside, 0.0)  # nothing, with a copy of everything on every host
        near = Factors(
            tokens + np.zeros(each.shape),
            each / self.here[self.hosts, place],
            np.maximum(inside, 0.0) * tokens,
            each / self.here[self.hosts, place] * self.waiting[self.hosts, place],
        )
        far = Factors(
            np.where(outside > 0, tokens, 0.0),
            np.where(self.far[place] > 0, each / groups, 0.0),
            outside * tokens,
            each * self.far[place] / groups,
        )
        return Spread(far, near, place, len(self.here))

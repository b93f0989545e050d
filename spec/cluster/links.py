"""Which link class an ordered pair of devices is in: rules by scope and kinds, and exceptions.

The scope of a pair is the smallest thing that holds both devices: their switch, their host, their hosts' rack, or the
cluster. A rule gives one scope a link class, for all kinds of devices or for those that it names; the rule that names
more of a pair's kinds decides. An exception gives one ordered pair another class. Every pair must have exactly one.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from ..curve import MAX_SECONDS, Curve
from ..document import Part, show
from .kinds import Device, Host, needs_bytes

Scope = Literal["switch", "host", "rack", "cluster"]
SCOPES: tuple[Scope, ...] = Scope.__args__  # type: ignore[attr-defined]
NONE = -1
MAX_NAMED = 256  # kinds that rules name: tables grow with their square


class LinkClass(Part):
    """Links that do the same: one-way seconds over bytes, measured alone."""

    name: str
    latency: float = Field(ge=0, le=MAX_SECONDS, description="seconds, one way, smallest message")
    curve: Curve = Field(description="axis: bytes")

    @model_validator(mode="after")
    def _over_bytes(self) -> "LinkClass":
        needs_bytes("link", self.curve)
        return self

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the largest message that was measured."""
        return self.curve.axes[0].values[-1] / max(self.curve.median[-1], 1e-12)


class LinkRule(Part):
    """The link class of all ordered pairs of one scope, or of those between the kinds that it names."""

    scope: Scope = Field(description="the smallest thing that holds both devices")
    source: str | None = Field(None, description="kind (or family of kinds) of the sending device; none: any")
    target: str | None = Field(None, description="kind (or family of kinds) of the receiving device; none: any")
    link: str = Field(description="name of the link class")


class LinkException(Part):
    """One ordered pair whose link was measured to differ from what the rules say."""

    source: int = Field(ge=0)
    target: int = Field(ge=0)
    link: str = Field(description="name of the link class")


class Where(NamedTuple):
    """Places and rule groups of the devices: ``levels`` [switch, host, rack][devices], ``group`` [devices].

    Devices whose family no rule names are all in group 0: a rule cannot tell them apart.
    """

    levels: np.ndarray
    group: np.ndarray
    groups: dict[str, int]

    @classmethod
    def of(
        cls, devices: Sequence[Device], hosts: Sequence[Host], families: Sequence[str], rules: Sequence[LinkRule] = ()
    ) -> "Where":
        """families: that of each device's kind."""
        host_of = {host.name: i for i, host in enumerate(hosts)}
        racks = {host.rack: i for i, host in enumerate(hosts) if host.rack is not None}
        rack_of = [i if host.rack is None else racks[host.rack] for i, host in enumerate(hosts)]
        host = np.array([host_of[device.host] for device in devices])
        switches: dict[tuple[str, object], int] = {}
        # A device without a switch has one of its own.
        switch = [
            switches.setdefault((device.host, i if device.switch is None else device.switch), len(switches))
            for i, device in enumerate(devices)
        ]
        named = dict.fromkeys(kind for rule in rules for kind in (rule.source, rule.target) if kind is not None)
        groups = {kind: i for i, kind in enumerate(named, 1)}
        if len(groups) > MAX_NAMED:
            raise ValueError(f"link_rules name {len(groups)} kinds, at most {MAX_NAMED}: give alike kinds a family")
        group = np.array([groups.get(family, 0) for family in families])
        return cls(np.stack([np.array(switch), host, np.array(rack_of)[host]]), group, groups)

    def scope(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Index in SCOPES: places nest, so that it is the number of levels that differ."""
        return sum((level[sources] != level[targets] for level in self.levels), np.zeros((), np.int64))

    def pairs(self) -> np.ndarray:
        """[scope, group, group] ordered pairs of two devices, counted without looking at each."""
        size = len(self.groups) + 1
        within = [np.diag(np.bincount(self.group, minlength=size)).astype(float)]  # of a device with itself
        for level in (*self.levels, np.zeros_like(self.group)):
            count = np.zeros((level.max() + 1, size))
            np.add.at(count, (level, self.group), 1)
            within.append(count.T @ count)
        return np.diff(within, axis=0).round().astype(np.int64)


class Links:
    """Looks up the class of any pairs at once; O(1) each, plus a binary search where there are exceptions.

    families: that of each device's kind; where: places of the devices, with groups for these rules. Raises ValueError,
    naming what and where, for rules and exceptions that do not give every pair one class.
    """

    def __init__(
        self,
        families: Sequence[str],
        where: Where,
        classes: Sequence[LinkClass],
        rules: Sequence[LinkRule],
        exceptions: Sequence[LinkException],
    ) -> None:
        self.families, self.where = families, where
        self.devices, self.classes = len(families), len(classes)
        class_of = {link.name: i for i, link in enumerate(classes)}
        self.table = _table(rules, class_of, self.where.groups)
        self.keys, self.values = _sorted(exceptions, class_of, self.devices)
        self._check()

    def index(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Index of the link class of each pair, of the broadcast shape; the diagonal is -1."""
        group = self.where.group
        found = self.table[self.where.scope(sources, targets), group[sources], group[targets]]
        if len(self.keys):
            key = sources * self.devices + targets
            at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
            found = np.where(self.keys[at] == key, self.values[at], found)
        return np.where(sources == targets, NONE, found)

    def counts(self) -> np.ndarray:
        """[scope, class] ordered pairs of two devices."""
        by_rule, moved = self._by_rule()
        counts = np.zeros((len(SCOPES), self.classes), np.int64)
        known = self.table != NONE
        np.add.at(counts, (np.nonzero(known)[0], self.table[known]), by_rule[known])
        np.add.at(counts, (moved, self.values), 1)
        return counts

    def _by_rule(self) -> tuple[np.ndarray, np.ndarray]:
        """[scope, group, group] pairs that no exception takes out, and the scope of each exception."""
        source, target = self.keys // max(self.devices, 1), self.keys % max(self.devices, 1)
        scope = self.where.scope(source, target)
        counts = self.where.pairs()
        np.subtract.at(counts, (scope, self.where.group[source], self.where.group[target]), 1)
        return counts, scope

    def _check(self) -> None:
        by_rule, _ = self._by_rule()
        lacking = np.argwhere((by_rule > 0) & (self.table == NONE))
        if not len(lacking):
            return
        everyone = np.arange(self.devices)
        for source in everyone.tolist():
            missing = np.flatnonzero((self.index(np.array(source), everyone) == NONE) & (everyone != source))
            if len(missing):
                target = int(missing[0])
                kinds = f"{show(self.families[source])} to {show(self.families[target])}"
                scope = SCOPES[int(self.where.scope(np.array(source), np.array(target)))]
                raise ValueError(
                    f"no link rule covers devices {source} to {target} (scope {scope}, {kinds}): "
                    f'add one to link_rules: {{"scope": "{scope}", "link": ...}}'
                )


def _table(rules: Sequence[LinkRule], class_of: dict[str, int], groups: dict[str, int]) -> np.ndarray:
    """[scope, group of the source, group of the target] link class, -1 where no rule says."""
    size = len(groups) + 1
    table = np.full((len(SCOPES), size, size), NONE, np.int32)
    decided, doubted = np.full_like(table, NONE), np.full_like(table, NONE)  # by which rule, and by which other one
    names = [(rule.source is not None) + (rule.target is not None) for rule in rules]
    for i in sorted(range(len(rules)), key=names.__getitem__):
        rule = rules[i]
        if rule.link not in class_of:
            raise ValueError(f"link_rules[{i}].link {show(rule.link)} is not among link_classes")
        source = slice(None) if rule.source is None else groups[rule.source]
        target = slice(None) if rule.target is None else groups[rule.target]
        at = SCOPES.index(rule.scope), source, target
        before = decided[at]
        equal = np.append(names, NONE)[before] == names[i]  # NONE reads the last
        doubted[at] = np.where(equal, before, NONE)
        table[at], decided[at] = class_of[rule.link], i
    if (doubted != NONE).any():
        at = tuple(np.argwhere(doubted != NONE)[0])
        raise ValueError(
            f"link_rules[{doubted[at]}] and [{decided[at]}] both say what the same links of scope {SCOPES[at[0]]} are"
        )
    return table


def _sorted(
    exceptions: Sequence[LinkException], class_of: dict[str, int], devices: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys source * devices + target, rising, and the link class of each."""
    found: dict[int, int] = {}
    for i, entry in enumerate(exceptions):
        where, pair = f"link_exceptions[{i}]", f"{entry.source} to {entry.target}"
        if max(entry.source, entry.target) >= devices or entry.source == entry.target:
            raise ValueError(f"{where}: {pair} is no pair of two of the {devices} devices")
        if entry.link not in class_of:
            raise ValueError(f"{where}.link {show(entry.link)} is not among link_classes")
        key = entry.source * devices + entry.target
        if key in found:
            raise ValueError(f"{where}: {pair} has an exception already")
        found[key] = class_of[entry.link]
    keys = np.array(sorted(found), np.int64)
    return keys, np.array([found[key] for key in keys.tolist()], np.int64)

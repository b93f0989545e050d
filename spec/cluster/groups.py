"""Curves of collectives: of an exact group of devices, or of all groups of one shape.

The shape of a group is how many of its members are on each of its hosts, most first: 4+4 are eight devices on two
hosts. A curve of a shape may be limited to groups whose members are of certain kinds, and to those of a certain scope.
The curve of a group is the exact one, else that of its shape which is limited most.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from ..curve import Curve
from ..document import Part, show
from ..errors import MissingCurveError
from ..operators import Collective
from .kinds import needs_bytes
from .links import SCOPES, Scope, Where

SHOWN = 8  # devices of a group that an error lists


class CollectiveCurve(Part):
    """Seconds of a collective of the runtime over one group of devices, or over all groups of one shape.

    The axis is ``bytes``: all_to_all, what each device sends each other device; all_gather, what each device
    contributes; reduce_scatter, what each device receives; all_reduce, the whole buffer.
    ``curve`` counts from when all devices are due, coming from equally long work, each as late as its processors let it
    be; ``last`` from when the last of them has come.
    ``busy`` is the processor time that a device spends on it (the communication library's threads), which an
    overlapped computation loses.
    """

    collective: Collective
    traffic: Literal["equal", "skewed"] = "equal"
    group: tuple[int, ...] | None = Field(None, description="exactly these devices")
    members: tuple[int, ...] | None = Field(None, description="any group with so many members on each host, most first")
    kinds: tuple[str, ...] | None = Field(
        None, description="with members: only groups of all of these kinds (or families), no others"
    )
    scope: Scope | None = Field(None, description="with members: only groups of this scope, the widest of its pairs")
    curve: Curve
    busy: Curve
    last: Curve | None = Field(None, description="from when the last device has come; curve where it was not measured")

    @model_validator(mode="after")
    def _one_form(self) -> "CollectiveCurve":
        needs_bytes(self.collective, self.curve, self.busy, *([self.last] if self.last else []))
        if (self.group is None) == (self.members is None):
            raise ValueError("needs either group (exact devices) or members (so many on each host)")
        if self.group is not None and (self.kinds is not None or self.scope is not None):
            raise ValueError("kinds and scope go with members; group names the devices themselves")
        if self.members is not None:
            if sum(self.members) < 2 or min(self.members) < 1 or list(self.members) != sorted(self.members)[::-1]:
                raise ValueError(f"members must be two or more in all, most first, got {show(list(self.members))}")
            if self.kinds is not None and len(set(self.kinds)) != len(self.kinds):
                raise ValueError(f"kinds repeat: {show(list(self.kinds))}")
        return self


class GroupShape(NamedTuple):
    """What groups that are alike share; members: on each host, most first; kinds: their families, sorted."""

    members: tuple[int, ...]
    kinds: tuple[str, ...]
    scope: Scope

    def __str__(self) -> str:
        hosts = "+".join(map(str, self.members[:SHOWN])) + ("+..." if len(self.members) > SHOWN else "")
        return f"{sum(self.members)} devices, {hosts} on {len(self.members)} host(s), scope {self.scope}"


class Groups:
    """The curves of a cluster by collective, traffic and group or shape.

    families: that of each device's kind; where: places of the devices. Raises ValueError for a group of other devices,
    an unknown kind, or two curves of the same.
    """

    def __init__(self, entries: Sequence[CollectiveCurve], families: Sequence[str], where: Where) -> None:
        self.families, self.where = families, where
        self.curves: dict[tuple, CollectiveCurve] = {}
        known = set(families)
        for i, entry in enumerate(entries):
            if entry.group is not None and not self._is_group(entry.group):
                raise ValueError(f"collectives[{i}].group must name two or more of the {len(families)} devices")
            if unknown := [kind for kind in entry.kinds or () if kind not in known]:
                raise ValueError(f"collectives[{i}].kinds: no device is of kind {show(unknown[0])}")
            limits = None if entry.kinds is None else tuple(sorted(entry.kinds)), entry.scope
            key = entry.collective, entry.traffic, *((entry.group,) if entry.group else (entry.members, *limits))
            if key in self.curves:
                raise ValueError(f"collectives[{i}]: a curve of {entry.collective} over the same is there already")
            self.curves[key] = entry

    def _is_group(self, group: tuple[int, ...]) -> bool:
        return len(set(group)) == len(group) >= 2 and all(0 <= device < len(self.families) for device in group)

    def shape(self, group: Sequence[int]) -> GroupShape:
        """The shape of two or more devices."""
        members = np.asarray(group)
        hosts = np.unique(self.where.levels[1][members], return_counts=True)[1]
        widest = sum(len(np.unique(level[members])) > 1 for level in self.where.levels)
        kinds = tuple(sorted({self.families[device] for device in group}))
        return GroupShape(tuple(sorted(hosts.tolist(), reverse=True)), kinds, SCOPES[widest])

    def find(self, collective: Collective, group: tuple[int, ...]) -> CollectiveCurve:
        """The equal-traffic curve; MissingCurveError says which one to measure."""
        found = self.curves.get((collective, "equal", group))
        if found is not None:
            return found
        shape = self.shape(group)
        for limits in ((shape.kinds, shape.scope), (shape.kinds, None), (None, shape.scope), (None, None)):
            found = self.curves.get((collective, "equal", shape.members, *limits))
            if found is not None:
                self.curves[collective, "equal", group] = found  # a search asks for the same again and again
                return found
        listed = f"[{', '.join(map(str, group[:SHOWN]))}{', ...' if len(group) > SHOWN else ''}]"
        raise MissingCurveError(
            f"the cluster has no {collective} curve for devices {listed} ({shape}): measure it with `moeplan profile`"
        )

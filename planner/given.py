"""A user's own placement: checked against model and cluster, and turned into the plan's ``ep`` layers."""

from dataclasses import dataclass

import numpy as np

from ..spec.cluster import Cluster
from ..spec.errors import MoeplanError
from ..spec.model import Model
from ..spec.placement import Placement
from ..spec.plan import LayerPlan, PlacementRecord
from .place.layers import layer_plan

SHOWN = 6  # hosts, and devices of one, that an error lists


@dataclass(frozen=True, eq=False)
class Given:
    """A placement for this model on this cluster; ``layers``: its plan, one entry per mixture-of-experts layer.

    name: of its file; note: what the plan says of it.
    """

    placement: Placement
    name: str
    layers: tuple[LayerPlan, ...]
    note: str

    @classmethod
    def of(cls, placement: Placement, model: Model, cluster: Cluster, name: str) -> "Given":
        """Raises ``MoeplanError`` where it is for another model or for other devices; name: of its file, for errors."""
        _check_model(placement, model, name)
        _check_devices(placement, cluster, name)
        note = f"the placement was given ({name}): every layer keeps its slots and shares"
        if placement.model not in ("", model.name):
            note += f"; it was made for {placement.model}"
        return cls(placement, name, tuple(layer_plan(layer) for layer in placement.layers), note)

    @property
    def record(self) -> PlacementRecord:
        """Who found it, as it says itself."""
        solver = self.placement.solver
        return PlacementRecord(
            layers=tuple(range(len(self.layers))),
            method="given",
            solver=f"given in {self.name}",
            minimised=solver.minimised,
            objective=solver.objective,
            bound=solver.bound,
            gap=solver.gap,
        )


def _check_model(placement: Placement, model: Model, name: str) -> None:
    moe = model.moe_block().moe
    assert moe is not None
    got, want = (len(placement.layers), placement.num_experts), (len(model.moe_layers), moe.num_experts)
    if got != want:
        of = f" (made for {placement.model})" if placement.model else ""
        raise MoeplanError(
            f"{name}: places {got[0]} layers x {got[1]} experts{of}; {model.name} has {want[0]} x "
            f"{want[1]}: name its --model, or place again with a trace of this one"
        )


def _check_devices(placement: Placement, cluster: Cluster, name: str) -> None:
    mine, theirs = ([device.host for device in document.devices] for document in (placement, cluster))
    if len(mine) != len(theirs):
        raise MoeplanError(
            f"{name}: is for {len(mine)} devices, the cluster has {len(theirs)}: place again with --cluster, or "
            f"--devices {len(theirs)}"
        )
    if _numbers(mine) != _numbers(theirs):
        raise MoeplanError(
            f"{name}: its devices stand on hosts as {_groups(mine)}, the cluster's as {_groups(theirs)}: place again "
            f"with --cluster, or --hosts {len(set(theirs))}"
        )


def _numbers(hosts: list[str]) -> list[int]:
    """[devices] hosts numbered as they first come: names differ between documents, the grouping may not."""
    number = {host: i for i, host in enumerate(dict.fromkeys(hosts))}
    return [number[host] for host in hosts]


def _groups(hosts: list[str]) -> str:
    """Devices by host, as in `0-1 | 2-3`."""
    number = np.array(_numbers(hosts))
    groups = [np.flatnonzero(number == host) for host in range(min(number.max() + 1, SHOWN))]
    more = f" | ... ({number.max() + 1} hosts)" if number.max() >= SHOWN else ""
    return " | ".join(map(_numbered, groups)) + more


def _numbered(devices: np.ndarray) -> str:
    if len(devices) > 1 and (np.diff(devices) == 1).all():
        return f"{devices[0]}-{devices[-1]}"
    return " ".join(map(str, devices[:SHOWN])) + (" ..." if len(devices) > SHOWN else "")

"""Whether ranks are the devices that a plan was made for: looked at before they start, and by each rank again."""

from collections.abc import Sequence

from ..spec import MoeplanError, Plan
from .launch.rank import Seated

SHARE_TOLERANCE = 0.01


def verify_devices(plan: Plan, seated: Sequence[Seated]) -> None:
    """Raises MoeplanError for another number of ranks, and for what is known of a rank and is not its device's."""
    if len(seated) != len(plan.devices):
        raise MoeplanError(
            f"the plan is for {len(plan.devices)} devices, there are {len(seated)} ranks: start as many, or solve again"
        )
    again = "run it there, or make a new plan with `moeplan profile` and `moeplan solve`"
    pairs = list(zip(plan.devices, seated, strict=True))
    for i, (device, rank) in enumerate(pairs):
        if rank.host not in (None, device.host):
            raise MoeplanError(
                f"the plan's device {i} is on host {device.host!r}, rank {i} is on {rank.host!r}: {again}"
            )
    for i, (device, rank) in enumerate(pairs):
        if rank.kind not in (None, device.kind):
            raise MoeplanError(f"the plan's device {i} is {device.kind}, the rank's {rank.kind}: {again}")
        share = rank.cpu_share
        if device.kind == "cpu" and share and abs(device.cpu_share - share) > SHARE_TOLERANCE * device.cpu_share:
            raise MoeplanError(f"the plan's device {i} may use {device.cpu_share:g} cores, the rank {share:g}: {again}")

"""A plan's step as it was predicted, operation by operation, on the cluster that the plan was made for."""

from typing import TYPE_CHECKING

from ..spec.errors import MoeplanError

if TYPE_CHECKING:
    from ..planner.simulator import Timeline
    from ..spec.cluster import Cluster
    from ..spec.plan import Plan
    from ..spec.trace import Trace


def simulated(plan: "Plan", cluster: "Cluster", trace: "Trace | None", where: str) -> "Timeline":
    """trace: the plan's, where its routing is recorded. where: names the cluster. MoeplanError for another cluster."""
    # Imported when it is needed: most who read a plan do not simulate it.
    from ..planner.step import Step

    found, wanted = cluster.digest(), plan.digests.get("cluster")
    if wanted is not None and found != wanted:
        raise MoeplanError(f"{where}: not the cluster that the plan was made for (digest {found}, plan's {wanted})")
    return Step.of(plan, cluster, trace).timeline(plan.layers)

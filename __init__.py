"""moeplan: plan, prove and run mixture-of-experts models on unequal hardware."""

from .spec import Cluster, Model, MoeplanError, Plan, Report, Trace, Workload

__version__ = "0.1.0"
__all__ = ["Cluster", "Model", "MoeplanError", "Plan", "Report", "Trace", "Workload", "__version__"]

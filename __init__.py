"""moeplan: plan, prove and run mixture-of-experts models on unequal hardware."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .spec import Cluster, Model, MoeplanError, Plan, Report, Trace, Workload

__version__ = "0.1.0"
__all__ = ["Cluster", "Model", "MoeplanError", "Plan", "Report", "Trace", "Workload", "__version__"]


def __getattr__(name: str) -> Any:
    """Imported when first asked for: the command line must come to the point where it minds Ctrl-C at once."""
    if name in __all__:
        return getattr(import_module(".spec", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

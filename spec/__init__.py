"""The documents that flow between the packages of moeplan, and the vocabulary they share."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cluster import Cluster
    from .errors import MoeplanError
    from .model import Model
    from .placement import Placement
    from .plan import Plan
    from .report import Report
    from .trace import Trace
    from .workload import Workload

__all__ = ["Cluster", "Model", "MoeplanError", "Placement", "Plan", "Report", "Trace", "Workload"]

_FILES = {name: "errors" if name == "MoeplanError" else name.lower() for name in __all__}


def __getattr__(name: str) -> Any:
    """Imported when first asked for: a command needs few of the documents, and its time limit counts from its start."""
    if name in _FILES:
        return getattr(import_module(f".{_FILES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

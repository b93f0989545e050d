"""moeplan: plan, prove and run mixture-of-experts models on unequal hardware.

    from moeplan import Cluster, Placement, Trace, place, profile, run, solve

The functions do what the commands of the same names do, on documents; see ``service/library.py`` and
``examples/library.py``. ``moeplan.transformers.apply_plan`` runs a user's own model under a plan.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .spec.readers import others

if TYPE_CHECKING:
    from .service.client import Client
    from .service.library import place, profile, run, solve
    from .spec import Cluster, Model, MoeplanError, Placement, Plan, Report, Trace, Workload

__version__ = "0.2.0"
__all__ = [
    "Client",
    "Cluster",
    "Model",
    "MoeplanError",
    "Placement",
    "Plan",
    "Report",
    "Trace",
    "Workload",
    "__version__",
    "place",
    "profile",
    "run",
    "solve",
]

_HOMES = dict.fromkeys(("place", "profile", "run", "solve"), ".service.library") | {"Client": ".service.client"}


def __getattr__(name: str) -> Any:
    """Imported when first asked for: the command line must come to the point where it minds Ctrl-C at once."""
    if name in __all__:
        return getattr(import_module(_HOMES.get(name, ".spec"), __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Transformers(ModuleType):
    """``moeplan.transformers``: ``runtime.embedding``, imported when something of it is asked for.

    No file of this name: the root is the folder where programs of this repository start, and ``import transformers``
    would find it there in the place of the package.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module(".runtime.embedding", __name__), name)


sys.modules[f"{__name__}.transformers"] = transformers = _Transformers(f"{__name__}.transformers")


def _by_transformers(body: dict[str, Any], where: str, name: str, source: str) -> "Model":
    """Imported when a model asks for it: Transformers takes seconds."""
    model: Model = import_module(".profiler.families", __name__).read_family(body, where, name, source)
    return model


others[:] = [_by_transformers]

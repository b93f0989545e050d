"""Builders: the stages of layers for each strategy; the runtime has an executor of the same name for each."""

from collections.abc import Callable, Sequence

from ...spec.plan import LayerPlan
from ..stages import Stage
from . import ep, gathered, hierarchical, sharded
from .layer import Layer

BUILDERS: dict[str, Callable[[Layer, Sequence[LayerPlan]], list[Stage]]] = {
    "ep": ep.build,
    "hierarchical": hierarchical.build,
    "sharded": sharded.build,
    "gathered": gathered.build,
}

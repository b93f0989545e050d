"""Builders: one layer's operations for each strategy; the runtime has an executor of the same name for each."""

from collections.abc import Callable

from ...spec.plan import LayerPlan
from ..graph import Graph
from . import ep, gathered, sharded
from .layer import Layer

BUILDERS: dict[str, Callable[[Graph, Layer, LayerPlan], None]] = {
    "ep": ep.build,
    "sharded": sharded.build,
    "gathered": gathered.build,
}

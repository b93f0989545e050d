"""Experts that run beside the backbone: layers with a shortcut (``spec.shortcut``) under way in one step.

Letters: T this device's tokens, D model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ..spec import Model
from ..spec.operators import Part
from .layout import Layout
from .router import Choice, Chooser, Routed, choose, routed
from .strategies import Strategy
from .strategies.ep import ExpertParallel, Flight
from .weights import LayerWeights


@dataclass
class _Trip:
    """A layer's tokens on their way; ``passed``: operators of its window that have begun; ``routed``: the tokens here,
    where identity experts are to be added at the end."""

    strategy: ExpertParallel
    routed: Routed | None
    flight: Flight
    lap: Callable[[Part], None]
    passed: int = 0
    computed: bool = False


class Beside:
    """``layers``: those of this step; ``choice``: forced experts of a layer, or None; ``lap`` books time of a layer;
    ``chooser``: how experts are chosen otherwise."""

    def __init__(
        self,
        model: Model,
        layers: Sequence[LayerWeights],
        strategies: Mapping[int, Strategy],
        layout: Layout,
        choice: Callable[[int], Choice | None],
        lap: Callable[[int, Part], Any],
        chooser: Chooser = choose,
    ) -> None:
        self._model, self._layers, self._strategies, self._layout = model, layers, strategies, layout
        self._choice, self._lap, self._chooser = choice, lap, chooser
        self._trips: dict[int, _Trip] = {}

    def read(self, index: int, x: Tensor, state: str) -> None:
        """``x`` [T, D] is what the experts of layer ``index`` read, if its shortcut comes from this state: route and
        send."""
        if index >= len(self._layers) or self._model.layers[index].shortcut != state:
            return
        block, weights, strategy = self._model.layers[index], self._layers[index], self._strategies[index]
        assert block.moe is not None
        assert weights.router is not None
        assert isinstance(strategy, ExpertParallel)
        lap = partial(self._lap, index)
        tokens = routed(x, weights.router, block.moe, self._choice(index), chooser=self._chooser)
        lap("route")
        flight = strategy.begin(tokens.normed, tokens.ids, tokens.weights, self._layout, lap)
        kept = tokens if tokens.identity is not None else None  # else its memory is free while tokens travel
        self._trips[index] = _Trip(strategy, kept, flight, lap)

    def turn(self) -> None:
        """An operator of the backbone comes next: compute the experts whose slot is before it."""
        for trip in self._trips.values():
            if trip.passed == trip.strategy.slot:
                trip.strategy.compute(trip.flight, trip.lap)
                trip.computed = True
            trip.passed += 1

    def join(self, index: int, x: Tensor) -> Tensor:
        """``x`` [T, D] at the end of layer ``index``, with its experts' output where they ran beside it."""
        trip = self._trips.pop(index, None)
        if trip is None:
            return x
        if not trip.computed:
            trip.strategy.compute(trip.flight, trip.lap)
        x = x if trip.routed is None else trip.routed.onto(x)
        return trip.strategy.end(trip.flight, x, trip.lap)

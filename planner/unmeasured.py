"""What a prediction reads beyond the sizes that were measured, as text."""

import shlex
from collections.abc import Mapping

import numpy as np

from ..spec.curve import Axis
from ..spec.model import Model
from ..spec.workload import Workload


class Unmeasured:
    """The furthest readings of each curve, axis by axis."""

    def __init__(self) -> None:
        self._asked: dict[str, dict[str, float]] = {}
        self._measured: dict[str, dict[str, float]] = {}

    def add(self, what: str, axes: tuple[Axis, ...], at: Mapping[str, np.ndarray]) -> None:
        """Readings of ``what`` at these coordinates, one array for each axis, some of which lie beyond its values."""
        for axis in axes:
            furthest, last = float(np.max(at[axis.name])), axis.values[-1]
            if axis.beyond == "flagged" and furthest > last:
                asked, measured = self._asked.setdefault(what, {}), self._measured.setdefault(what, {})
                asked[axis.name] = max(furthest, asked.get(axis.name, 0.0))
                measured[axis.name] = min(last, measured.get(axis.name, last))

    def __str__(self) -> str:
        """``attention_prefill at length 512 (measured to 128); ...``; empty where there is nothing."""
        alike: dict[str, list[str]] = {}
        for what, of in self._asked.items():
            last = self._measured[what]
            where = ", ".join(f"{axis} {far:,.0f} (measured to {last[axis]:,.0f})" for axis, far in of.items())
            alike.setdefault(where, []).append(what)
        return "; ".join(f"{', '.join(names)} at {where}" for where, names in alike.items())

    def notes(self, model: Model, asked: str, workload: Workload, dtype: str) -> list[str]:
        """One line, with the command that measures there; none where there is nothing. asked: what the user typed for
        the model."""
        if not self._asked:
            return []
        other = "" if dtype == model.dtype else f" --dtype {dtype}"
        command = f"moeplan profile --model {shlex.quote(asked)}{other} --workload {workload}"
        return [f"extrapolated: {self}; measure there with `{command}` on the same devices"]

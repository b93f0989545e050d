"""Which resting experts a layer needs, foreseen from what the step's tokens chose in the layer before.

Letters: E experts, R of them that rest on a device, K top-k.

q(e | f): how many of the tokens that choose expert f in one layer choose e in the next, by a trace. A token with the
choices f1 .. fK is taken to leave e out with the geometric mean of 1 - q(e | fk), and tokens to choose by themselves.
Then a step needs e with probability

    p(e) = 1 - product over f of (1 - q(e | f)) ** (n(f) / K),    n(f): tokens of the step that chose f.

All that a device has to know is n, which devices tell each other with the numbers of rows that they send.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, StringConstraints

from .document import Part

STEPS = 256
"""Of a probability as it is written, in one byte; the last stands for itself and all above."""
MAX_CHANCES = 2**22
"""Probabilities in a plan: two characters each."""
Row = Annotated[str, StringConstraints(pattern="^([0-9a-f]{2})*$")]
_LEFT_OUT = -np.log1p(-np.arange(STEPS) / STEPS)  # [STEPS] of 1 - q: minus its logarithm
Lists = tuple[tuple[int, ...], ...]  # of each device


class Foresight(Part):
    """Of an ``offload`` plan, in place of its layers' lists ``ahead``, all but the first's."""

    least: float = Field(gt=0, lt=1, description="experts that are needed with this probability are read ahead")
    tokens: int = Field(ge=0, description="of the trace, by which the probabilities are known")
    chances: tuple[tuple[Row, ...], ...] = Field(
        min_length=1,
        description="of every layer but the first, for each of its experts that rests on any device, in rising order: "
        "q(e | f) for each expert f of the layer before, in 256ths, of two hexadecimal digits each",
    )

    def table(self, ordinal: int) -> np.ndarray:
        """[R, E] uint8 of a layer, with R experts that rest on any device."""
        rows = self.chances[ordinal - 1]
        if not rows:
            return np.zeros((0, 0), np.uint8)
        return np.frombuffer(bytes.fromhex("".join(rows)), np.uint8).reshape(len(rows), -1)

    def check(self, layers: Sequence[tuple[Lists, Lists, Lists]], experts: Sequence[int]) -> None:
        """Raise ``ValueError`` where it contradicts the layers' ``slots``, ``resident`` and ``ahead``, or their numbers
        of experts."""
        if len(self.chances) != len(layers) - 1:
            raise ValueError(f"foresight.chances: {len(self.chances)} lists, expected one for each layer but the first")
        for j, (slots, resident, ahead) in enumerate(layers[1:], 1):
            rows, rest = self.chances[j - 1], resting(slots, resident)
            if len(rows) != len(rest):
                raise ValueError(f"foresight.chances[{j - 1}]: {len(rows)} experts, but {len(rest)} of layer {j} rest")
            if any(len(row) != 2 * experts[j - 1] for row in rows):
                raise ValueError(f"foresight.chances[{j - 1}]: expected {2 * experts[j - 1]} digits for each expert")
            if any(ahead):
                raise ValueError(f"layers[{j}].ahead: what it needs is foreseen; only the first layer has a list")
        if sum(len(row) for rows in self.chances for row in rows) > 2 * MAX_CHANCES:
            raise ValueError(f"foresight.chances: more than {MAX_CHANCES:,} probabilities")


@dataclass(frozen=True)
class Foreseen:
    """What one layer may need on one device. experts: [R] that rest there, rising; chances: [R, E] uint8."""

    experts: np.ndarray
    chances: np.ndarray
    least: float
    top_k: int

    def ahead(self, chosen: np.ndarray) -> tuple[int, ...]:
        """What is read ahead, the likeliest first; chosen: [E] tokens that chose each expert of the layer before."""
        if not len(self.experts):
            return ()
        some = np.flatnonzero(chosen)
        left_out = _LEFT_OUT[self.chances[:, some]] @ chosen[some] / self.top_k  # [R] -log(1 - p)
        likely = np.argsort(-left_out, kind="stable")
        return tuple(self.experts[likely[left_out[likely] >= -np.log1p(-self.least)]].tolist())


def foreseen(foresight: Foresight, ordinal: int, slots: Lists, resident: Lists, top_k: int, device: int) -> Foreseen:
    """Of a layer but the first."""
    rest = np.array(resting(slots, resident), int)
    own = np.array(sorted(set(slots[device]) - set(resident[device])), int)
    return Foreseen(own, foresight.table(ordinal)[np.searchsorted(rest, own)], foresight.least, top_k)


def resting(slots: Lists, resident: Lists) -> list[int]:
    """Experts that any device has outside its memory, rising."""
    return sorted({e for held, stays in zip(slots, resident, strict=True) for e in set(held) - set(stays)})


def written(chances: np.ndarray) -> tuple[str, ...]:
    """[R, E] probabilities as a plan has them."""
    steps = np.minimum(np.rint(np.asarray(chances) * STEPS), STEPS - 1).astype(np.uint8)
    return tuple(row.tobytes().hex() for row in steps)

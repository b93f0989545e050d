"""Arguments of the library, checked where the command line's parser would: one line says what was expected."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, get_args

from ..spec.catalogue import load_model
from ..spec.catalogue.executed import load_executed
from ..spec.errors import MoeplanError
from ..spec.model import Model
from ..spec.workload import Workload


class Readable(Protocol):
    """A document that lies in a file."""

    @classmethod
    def read(cls, path: str | Path) -> Self: ...


D = TypeVar("D", bound=Readable)


def document(name: str, value: D | str | Path, kind: type[D]) -> tuple[D, str]:
    """The document, and the path where one was given."""
    if isinstance(value, kind):
        return value, ""
    if isinstance(value, str | Path):
        return kind.read(value), str(value)
    raise MoeplanError(f"{name} {_shown(value)}: expected a {kind.__name__}, or the path of one")


def optional(name: str, value: D | str | Path | None, kind: type[D]) -> tuple[D | None, str]:
    """The same of what may be left out."""
    return (None, "") if value is None else document(name, value, kind)


def model_of(value: str | Model, executed: bool = False) -> Model:
    """By catalogue name, by the path of a ``config.json``, or as it is; executed: as it is measured and run."""
    if isinstance(value, Model):
        return value
    if not isinstance(value, str):
        raise MoeplanError(f"model {_shown(value)}: expected a Model, a catalogue name or the path of a config.json")
    return load_executed(value) if executed else load_model(value)


def workload_of(value: Workload | str) -> Workload:
    if isinstance(value, Workload):
        return value
    if not isinstance(value, str):
        raise MoeplanError(f"workload {_shown(value)}: expected a Workload, or a text such as 'prefill:2048'")
    return Workload.from_text(value)


def check_whole(least: int = 1, **numbers: int | None) -> None:
    """What is there must be whole numbers from ``least``."""
    for name, value in numbers.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise MoeplanError(f"{name} {_shown(value)}: expected a whole number from {least}")


def check_seconds(finite: bool = True, **numbers: float) -> None:
    """Above 0; ``finite``: infinity, which is no limit, is none."""
    for name, value in numbers.items():
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not (known and value > 0 and (value < math.inf or not finite)):
            raise MoeplanError(f"{name} {_shown(value)}: expected a number of seconds above 0")


def check_choice(kind: Any, **values: str | None) -> None:
    """What is there must be one of a ``Literal``'s values."""
    for name, value in values.items():
        if value is not None and value not in get_args(kind):
            raise MoeplanError(f"{name} {_shown(value)}: expected one of {', '.join(get_args(kind))}")


def check_part(name: str, value: Sequence[float]) -> None:
    """Two fractions."""
    numbers = isinstance(value, tuple | list) and all(isinstance(v, int | float) for v in value)
    if not numbers or len(value) != 2:
        raise MoeplanError(f"{name} {_shown(value)}: expected two fractions, such as (0, 0.5)")


def check_slots(held: Sequence[int] | None) -> None:
    """Whole numbers from 1, one for each device."""
    if held is None:
        return
    if isinstance(held, str) or not isinstance(held, Sequence) or not held:
        raise MoeplanError(f"slots_per_device {_shown(held)}: expected whole numbers, one for each device")
    for value in held:
        check_whole(slots_per_device=value)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

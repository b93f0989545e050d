"""Typed reading of a Hugging Face ``config.json``: every failure names file, field, value and rule."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar, overload

from ..document import show
from ..errors import DocumentError

T = TypeVar("T")
LIMIT = 2**31 - 1
REQUIRED: Any = object()


class Fields:
    """The fields of one configuration.

    Each method takes the names under which the field is known (the first present one counts; JSON null counts as
    absent). An absent field has the ``default`` given, or else the one in ``defaults``; without either it is required.
    """

    def __init__(self, body: dict[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.body = body
        self.where = where
        self.defaults = defaults or {}

    def error(self, name: str, rule: str) -> DocumentError:
        return DocumentError(f"{self.where}: {name}: {rule}")

    def find(self, *names: str) -> tuple[str, Any]:
        """Name and value of the first field present; the value is None where there is none."""
        return next(((name, self.body[name]) for name in names if self.body.get(name) is not None), (names[0], None))

    @overload
    def integer(self, *names: str, default: int = ..., low: int = ...) -> int: ...
    @overload
    def integer(self, *names: str, default: int | None, low: int = ...) -> int | None: ...
    def integer(self, *names: str, default: int | None = REQUIRED, low: int = 1) -> int | None:
        """A whole number from ``low``."""
        name, value = self.find(*names)
        if value is None:
            return self._absent(names, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= LIMIT:
            raise self.error(name, f"expected a whole number from {low} to {LIMIT} (got {show(value)})")
        return value

    def nullable(self, name: str, low: int = 1) -> int | None:
        """A whole number where null means none, which is not the same as absent."""
        return self.integer(name, low=low, **({"default": None} if name in self.body else {}))

    @overload
    def number(self, *names: str, default: float = ...) -> float: ...
    @overload
    def number(self, *names: str, default: float | None) -> float | None: ...
    def number(self, *names: str, default: float | None = REQUIRED) -> float | None:
        """A finite number above 0."""
        name, value = self.find(*names)
        if value is None:
            return self._absent(names, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(name, f"expected a number above 0 (got {show(value)})")
        try:
            return float(value)
        except OverflowError:
            raise self.error(name, f"expected a number that fits a float (got {show(value)})") from None

    def flag(self, name: str, default: bool = REQUIRED) -> bool:
        _, value = self.find(name)
        if value is None:
            value = self._absent((name,), default)
        if not isinstance(value, bool):
            raise self.error(name, f"expected true or false (got {show(value)})")
        return value

    def choice(self, *names: str, among: dict[str, T], default: str = REQUIRED) -> T:
        """One of the texts that moeplan knows, translated; ``default`` is such a text."""
        name, value = self.find(*names)
        if value is None:
            value = self._absent(names, default)
        if not isinstance(value, str) or value not in among:
            raise self.error(name, f"expected one of {', '.join(among)} (got {show(value)})")
        return among[value]

    def items(self, name: str, kind: type[T]) -> list[T]:
        """A list of ``kind``; absent: empty."""
        _, value = self.find(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self.error(name, f"expected a list of {kind.__name__} (got {show(value)})")
        return value

    def table(self, name: str) -> "Fields":
        """A nested object as fields of its own; absent: empty."""
        _, value = self.find(name)
        if value is not None and not isinstance(value, dict):
            raise self.error(name, f"expected an object (got {show(value)})")
        return Fields(value or {}, f"{self.where}: {name}")

    def refuse(self, name: str, *, unless: object, why: str) -> None:
        """Stop where a field asks for what the Model document cannot express, rather than ignore it."""
        _, value = self.find(name)
        if value is not None and value != unless:
            raise self.error(name, f"{why} (got {show(value)})")

    def _absent(self, names: tuple[str, ...], default: Any) -> Any:
        if default is REQUIRED:
            for name in names:
                if name in self.defaults:
                    return self.defaults[name]
            raise self.error(names[0], f"missing; a {show(self.body.get('model_type'))} configuration needs it")
        return default

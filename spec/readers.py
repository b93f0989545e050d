"""Who reads configurations of model families that have no reader in ``spec.catalogue``: the package asks Transformers.

A module of its own, without imports, so that the package can name the reader before anything is loaded.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model import Model

Reader = Callable[[dict[str, Any], str, str, str], "Model"]
"""Content of a ``config.json``, what errors call it, the model's name, its source -> the model."""

others: list[Reader] = []
"""At most one."""

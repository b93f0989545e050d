"""Models as they are measured, planned and run: what moeplan does not execute itself is read through Transformers."""

from pathlib import Path
from typing import Any

from ..document import parse_object, read_text
from ..errors import DocumentError
from ..executed import not_executed
from ..model import Model
from ..readers import others
from . import load_model
from .published import PUBLISHED

STORED = ("quantization_config", "compression_config")
"""How checkpoints are stored: the runtime holds every weight in the dtype that it computes in."""


def load_executed(name_or_path: str) -> Model:
    """As ``load_model``; of what moeplan's own layers do not execute the model that Transformers' layers do, if any.

    Raises MoeplanError in one line, and where Transformers is needed and missing.
    """
    model = load_model(name_or_path)
    if model.family_config is not None or not not_executed(model):
        return model
    body = _configuration(name_or_path)
    if body is None or not others:
        return model
    plain = {key: value for key, value in body.items() if key not in STORED}
    try:
        return others[0](plain, name_or_path, model.name, model.source)
    except DocumentError:
        return model


def _configuration(name_or_path: str) -> dict[str, Any] | None:
    """Content of the ``config.json`` that a model was read from; None for documents and models without any."""
    name = name_or_path.strip().lower()
    if name in PUBLISHED:
        return PUBLISHED[name][1]
    path = Path(name_or_path)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        return None
    body = parse_object(read_text(path), str(path))
    return None if "kind" in body else body

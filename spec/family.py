"""FamilyConfig: what Transformers builds a model from, so that every rank can build the same one from a plan."""

import json
from typing import Any

from pydantic import Field, field_validator

from .document import Part

MAX_CONFIG = 2**20
"""Characters of a configuration: a hundred times the longest published one."""


class FamilyConfig(Part):
    """The configuration of a model's text part, and what keeps it from being executed, if anything."""

    transformers: str = Field(max_length=40, description="version of Transformers that read it")
    config: str = Field(max_length=MAX_CONFIG, description="config.json of the text part, as JSON in one line")
    missing: str = Field(
        "", max_length=300, description="what keeps it from being executed, such as experts outside their interface"
    )

    @field_validator("config")
    @classmethod
    def _object(cls, text: str) -> str:
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({error})") from None
        if not isinstance(body, dict) or not isinstance(body.get("model_type"), str):
            raise ValueError("not an object with a model_type")
        return text

    @classmethod
    def of(cls, transformers: str, body: dict[str, Any], missing: str = "") -> "FamilyConfig":
        """From a parsed configuration. Raises ValueError where it is no JSON or too long."""
        return cls(transformers=transformers, config=json.dumps(body, sort_keys=True), missing=missing[:300])

    @property
    def body(self) -> dict[str, Any]:
        """The configuration, parsed."""
        found: dict[str, Any] = json.loads(self.config)
        return found

"""Documents: versioned JSON with one strict reader and one atomic writer."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema

from .errors import DocumentError
from .files import MAX_DOCUMENT_BYTES, read_text
from .output import write_atomically
from .texts import parse_object, show

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "Document",
    "Part",
    "describe",
    "parse_object",
    "read_text",
    "show",
    "write_atomically",
]


def _fail_fast(schema: Any) -> None:
    """Sets pydantic's ``fail_fast`` on every list and tuple of a schema."""
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "tuple"):
            schema["fail_fast"] = True
        for inner in schema.values():
            _fail_fast(inner)
    elif isinstance(schema, list):
        for inner in schema:
            _fail_fast(inner)


class Part(BaseModel):
    """A piece of a document: immutable, no unknown fields, no NaN or infinity.

    A list ends at its first wrong item: a million of them are reported no better, and each costs a kilobyte.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(schema)
        return schema

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with changed fields; what the original has computed from its own (cached properties) stays behind."""
        copied = super().model_copy(update=update, deep=deep)
        for name in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied


class Document(Part):
    """A JSON document with a kind and a version.

    Subclasses set ``kind`` and ``version``; both are written first and checked on reading. Those that still read
    ``earlier`` versions say how in ``read_earlier``.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    earlier: ClassVar[tuple[int, ...]] = ()

    def to_json(self) -> str:
        body = {"kind": self.kind, "version": self.version, **self.model_dump(mode="json")}
        return json.dumps(body, indent=1, allow_nan=False) + "\n"

    def write(self, path: str | Path) -> Path:
        """Write atomically: a reader never sees half a document."""
        text = self.to_json().encode()
        return write_atomically(path, lambda f: f.write(text))

    def digest(self) -> str:
        """SHA-256 over the content, the same on every machine."""
        body = json.dumps(self.model_dump(mode="json"), sort_keys=True, allow_nan=False)
        return hashlib.sha256(body.encode()).hexdigest()[:16]

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read and validate; every failure is one line naming file, field, value and rule."""
        return cls.parse(read_text(path, cls.hint()), str(path))

    @classmethod
    def parse(cls, text: str, where: str) -> Self:
        """Validate a JSON text; ``where`` names it in errors."""
        body = parse_object(text, where)
        kind, version = body.pop("kind", None), body.pop("version", None)
        if kind != cls.kind:
            raise DocumentError(f"{where}: kind: expected {cls.kind!r}, got {show(kind)}{cls.hint()}")
        if type(version) is not int or version not in (*cls.earlier, cls.version):
            read = " and ".join(map(str, (*cls.earlier, cls.version)))
            raise DocumentError(f"{where}: version: this moeplan reads {read}, got {show(version)}")
        try:
            if version != cls.version:
                return cls.read_earlier(version, json.dumps(body))
            # Strict: "8", 8.5 or true is no integer. In JSON mode an array is still a tuple.
            return cls.model_validate_json(json.dumps(body), strict=True)
        except ValidationError as error:
            raise DocumentError(f"{where}: {describe(error)}") from None
        except RecursionError:
            raise DocumentError(f"{where}: nested too deeply") from None

    @classmethod
    def read_earlier(cls, version: int, body: str) -> Any:
        """The document of today from the JSON of one of the ``earlier`` versions."""
        raise NotImplementedError(f"{cls.__name__} {version}")

    @classmethod
    def hint(cls) -> str:
        """What to do when the file is missing; subclasses name the command that makes it."""
        return ""

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The published JSON Schema, with kind and version."""
        schema = cls.model_json_schema()
        head = {"kind": {"const": cls.kind}, "version": {"const": cls.version}}
        schema["properties"] = head | schema["properties"]
        schema["required"] = ["kind", "version", *schema.get("required", [])]
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


_KINDS = ("int", "str")  # what pydantic adds to the path of a field that may be either


def describe(error: ValidationError) -> str:
    """One line for the first broken rule: field path, rule, value; and how many other fields are wrong."""
    errors = error.errors(include_url=False)
    first, paths = errors[0], {_path(one["loc"]): None for one in errors}
    # A list that ends at its first wrong item is called too short as well.
    short = {_path(one["loc"]) for one in errors if one["type"] == "too_short"}
    wrong = [path for path in paths if not (path in short and any(p[: len(path)] == path != p for p in paths))]
    field = ""
    for step in _path(first["loc"]):
        field += f"[{step}]" if isinstance(step, int) else f".{step}" if field else step
    field = field if field.isprintable() and len(field) <= 120 else show(field)
    # A rule about a whole object names its fields; the object itself would be shown as Python has it.
    got = "" if isinstance(first["input"], dict | BaseModel) else f" (got {show(first['input'])})"
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    rule = first["msg"].removeprefix("Value error, ")
    rule = rule if rule.isprintable() else repr(rule)
    return f"{field or 'document'}: {rule}{got}{more}"


def _path(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    return loc[:-1] if loc and loc[-1] in _KINDS else loc

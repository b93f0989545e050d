"""Documents: versioned JSON with one strict reader and one atomic writer."""

import hashlib
import json
import os
import reprlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import DocumentError

MAX_DOCUMENT_BYTES = 256 * 2**20


class Part(BaseModel):
    """A piece of a document: immutable, no unknown fields, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Document(Part):
    """A JSON document with a kind and a version.

    Subclasses set ``kind`` and ``version``; both are written first and checked on reading.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1

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
            raise DocumentError(f"{where}: kind: expected {cls.kind!r}, got {show(kind)}")
        if version != cls.version:
            raise DocumentError(f"{where}: version: this moeplan reads {cls.version}, got {show(version)}")
        try:
            # Strict: "8", 8.5 or true is no integer. In JSON mode an array is still a tuple.
            return cls.model_validate_json(json.dumps(body), strict=True)
        except ValidationError as error:
            raise DocumentError(f"{where}: {describe(error)}") from None
        except RecursionError:
            raise DocumentError(f"{where}: nested too deeply") from None

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


def read_text(path: str | Path, hint: str = "") -> str:
    """A UTF-8 text file of at most ``MAX_DOCUMENT_BYTES``; ``hint`` says where a missing file comes from."""
    try:
        with open(path, "rb") as f:
            data = f.read(MAX_DOCUMENT_BYTES + 1)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise DocumentError(f"{path}: larger than {MAX_DOCUMENT_BYTES >> 20} MiB, refused")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise DocumentError(f"{path}: no such file{hint}") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a null character in the path
        raise DocumentError(f"{str(path)!r}: cannot be read as UTF-8 text ({error})") from None


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object; ``where`` names it in errors."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{where}: not JSON ({error})") from None
    if not isinstance(body, dict):
        raise DocumentError(f"{where}: expected a JSON object, got {show(body)}")
    return body


def show(value: object) -> str:
    """A value in at most 60 printable characters, however large or deep it is."""
    shown = _SHORT.repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def describe(error: ValidationError) -> str:
    """One line for the first broken rule: field path, rule, value."""
    first = error.errors(include_url=False)[0]
    field = ""
    for step in first["loc"]:
        field += f"[{step}]" if isinstance(step, int) else f".{step}" if field else step
    field = field if field.isprintable() and len(field) <= 120 else show(field)
    # A rule about a whole object names its fields; the object itself would be shown as Python has it.
    got = "" if isinstance(first["input"], dict | BaseModel) else f" (got {show(first['input'])})"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    rule = first["msg"].removeprefix("Value error, ")
    rule = rule if rule.isprintable() else repr(rule)
    return f"{field or 'document'}: {rule}{got}{more}"


def write_atomically(path: str | Path, fill: Callable[[IO[bytes]], object]) -> Path:
    """Write through a temporary file in the same folder, then rename."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise DocumentError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        with os.fdopen(handle, "wb") as f:
            fill(f)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DocumentError(f"{path}: cannot be written ({error.strerror})") from None
        raise
    return path

"""Documents: versioned JSON with one strict reader and one atomic writer."""

import hashlib
import json
import os
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
        path = Path(path)
        try:
            if path.stat().st_size > MAX_DOCUMENT_BYTES:
                raise DocumentError(f"{path}: larger than {MAX_DOCUMENT_BYTES >> 20} MiB, refused")
            text = path.read_bytes().decode("utf-8")
        except FileNotFoundError:
            raise DocumentError(f"{path}: no such file{cls.hint()}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DocumentError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, where: str) -> Self:
        """Validate a JSON text; ``where`` names it in errors."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DocumentError(f"{where}: not JSON ({error})") from None
        if not isinstance(body, dict):
            raise DocumentError(f"{where}: expected a JSON object, got {type(body).__name__}")
        kind, version = body.pop("kind", None), body.pop("version", None)
        if kind != cls.kind:
            raise DocumentError(f"{where}: kind: expected {cls.kind!r}, got {kind!r}")
        if version != cls.version:
            raise DocumentError(f"{where}: version: this moeplan reads {cls.version}, got {version!r}")
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            raise DocumentError(f"{where}: {describe(error)}") from None

    @classmethod
    def hint(cls) -> str:
        """What to do when the file is missing; subclasses name the command that makes it."""
        return ""

    @classmethod
    def schema(cls) -> dict[str, Any]:
        """The published JSON Schema, with kind and version."""
        schema = cls.model_json_schema()
        head = {"kind": {"const": cls.kind}, "version": {"const": cls.version}}
        schema["properties"] = head | schema["properties"]
        schema["required"] = ["kind", "version", *schema.get("required", [])]
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def describe(error: ValidationError) -> str:
    """One line for the first broken rule: field path, rule, value."""
    first = error.errors(include_url=False)[0]
    field = ""
    for step in first["loc"]:
        field += f"[{step}]" if isinstance(step, int) else f".{step}" if field else str(step)
    value = repr(first["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    rule = first["msg"].removeprefix("Value error, ")
    return f"{field or 'document'}: {rule} (got {value}){more}"


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

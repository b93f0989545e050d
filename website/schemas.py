"""One page for the documents: every field with its type, its default and its rule, from the published JSON Schemas."""

import json
from pathlib import Path
from typing import Any

from .pages import ROOT, SCHEMAS

LIMITS = {
    "minimum": "at least",
    "maximum": "at most",
    "exclusiveMinimum": "above",
    "exclusiveMaximum": "below",
    "minLength": "characters, at least",
    "maxLength": "characters, at most",
    "minItems": "items, at least",
    "maxItems": "items, at most",
    "pattern": "matching",
}


def schemas_page(root: Path = ROOT) -> str:
    """Markdown: a heading for each document, a table of its fields, and one for each part that it is made of."""
    parts = ["# Documents", "All documents have a version and a published JSON Schema; the trace is an npz file."]
    for path in sorted((root / SCHEMAS).glob("*.json")):
        schema = json.loads(path.read_text())
        parts += [f"## {schema['title']}", f"[`{path.name}`](../schemas/{path.name})", schema.get("description", "")]
        parts.append(_arrays(schema["arrays"]) if "arrays" in schema else _fields(schema))
        for name, part in schema.get("$defs", {}).items():
            parts += [f"### {schema['title']}: {name}", part.get("description", "")]
            parts.append(_fields(part) if "properties" in part else f"Type: {kind_of(part)}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _fields(schema: dict[str, Any]) -> str:
    required = set(schema.get("required", ()))
    rows = ["| field | type | default | |", "|---|---|---|---|"]
    for name, field in schema["properties"].items():
        default = "required" if name in required else f"`{json.dumps(field['default'])}`" if "default" in field else ""
        told = [field.get("description", ""), *limits_of(field)]
        rows.append(_row(f"`{name}`", kind_of(field), default, "; ".join(part for part in told if part)))
    return "\n".join(rows)


def _arrays(arrays: dict[str, dict[str, Any]]) -> str:
    rows = ["| array | shape | dtype | default | |", "|---|---|---|---|---|"]
    for name, array in arrays.items():
        told = "; ".join(array[key] for key in ("description", "rule") if key in array)
        rows.append(
            _row(f"`{name}`", f"[{', '.join(array['shape'])}]", array["dtype"], str(array.get("default", "")), told)
        )
    return "\n".join(rows)


def _row(*cells: str) -> str:
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


def kind_of(field: dict[str, Any]) -> str:
    """The type of a field, as text."""
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    for several in ("anyOf", "oneOf"):
        if several in field:
            return " or ".join(kind_of(one) for one in field[several])
    match field.get("type"):
        case "array":
            if "prefixItems" in field:
                return f"[{', '.join(kind_of(item) for item in field['prefixItems'])}]"
            return f"list of {kind_of(field['items'])}" if "items" in field else "list"
        case "object":
            values = field.get("additionalProperties")
            return f"name -> {kind_of(values)}" if isinstance(values, dict) else "object"
        case None:
            return "any"
        case kind:
            return str(kind)


def limits_of(field: dict[str, Any]) -> list[str]:
    """The rules of a field, as text."""
    return [f"{rule} `{field[key]}`" for key, rule in LIMITS.items() if key in field]

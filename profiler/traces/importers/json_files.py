"""JSON and JSON lines of foreign programs, one document at a time, and what they hold as text.

Parsed JSON needs up to 80 times the memory of its text, so what a text can become is bounded before it is parsed; a
file of JSON lines is read line by line.
"""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from ....spec.document import show
from ....spec.errors import DocumentError
from .files import file_size

MAX_TEXT_BYTES = 128 * 2**20  # of one document or line
MAX_PARSED_BYTES = 384 * 2**20
COSTS = {b",": 40, b"[": 64, b"{": 240}  # bytes of a number and its place in a list, of a list, of a dictionary

ACCEPTED = (
    "accepted JSON: routed_experts of requests (SGLang, vLLM), logical_count (SGLang), expert load with "
    "physical_to_logical_map or logical_load (vLLM), top_indices by layer (Megatron-Core), one row per token "
    "(--from rows)"
)


def read_bodies(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and content of each document: the lines of a file whose first line is JSON by itself, else the file."""
    file_size(path)
    with open(path, "rb") as file:
        lines = _lines(file, path)
        number, line = next(lines, (0, b""))
        if not line:
            raise DocumentError(f"{path}: empty")
        try:
            body = _parse(line, str(path))
        except DocumentError:
            file.seek(0)
            text = file.read(MAX_TEXT_BYTES + 1)
            if len(text) > MAX_TEXT_BYTES:
                raise DocumentError(
                    f"{path}: JSON of more than {MAX_TEXT_BYTES >> 20} MiB in one piece, refused: write JSON lines"
                ) from None
            yield str(path), _parse(text, str(path))
            return
        second = next(lines, None)
        yield f"{path}:{number}" if second else str(path), body
        if second:
            for number, line in chain([second], lines):
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def found(body: Any) -> str:
    """What a document holds, in short."""
    if isinstance(body, dict):
        return f"an object with {', '.join(show(key) for key in list(body)[:8])}" if body else "an empty object"
    if isinstance(body, list):
        depth = depth_of(body)
        if not body:
            return "an empty list"
        if depth == 1 and isinstance(body[0], dict):
            return f"a list of {len(body)}, the first {found(body[0])}"
        return f"lists nested {depth} deep, of {len(body)}"
    return show(body)


def depth_of(value: Any) -> int:
    """How deep lists are nested along their first elements, up to 5."""
    depth = 0
    while isinstance(value, list) and depth < 5:
        depth, value = depth + 1, value[0] if value else None
    return depth


def _lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and text of each line that is not blank."""
    number = 0
    while line := file.readline(MAX_TEXT_BYTES + 1):
        number += 1
        if len(line) > MAX_TEXT_BYTES:
            raise DocumentError(f"{path}:{number}: a line of more than {MAX_TEXT_BYTES >> 20} MiB, refused")
        if line := line.strip():
            yield number, line


def _parse(text: bytes, where: str) -> Any:
    cost = sum(text.count(mark) * size for mark, size in COSTS.items())
    if cost > MAX_PARSED_BYTES:
        raise DocumentError(
            f"{where}: {text.count(b',')} values in one piece of JSON, refused: write JSON lines, or keep arrays as "
            "base64 or in an npz"
        )
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DocumentError(f"{where}: cannot be read as UTF-8 text ({error})") from None
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{where}: not JSON ({error})") from None

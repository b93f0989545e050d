"""ServingLoad: the requests that a served model answers, by text or from a log of requests.

Terms: isl, input tokens of a request; osl, output tokens; concurrency, requests in flight at once; rate, requests per
second; TTFT, seconds to the first output token; TPOT, seconds between output tokens.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from pydantic import Field, model_validator

from .document import Part, read_text, show
from .errors import DocumentError, MoeplanError

PREFIX = "serve:"
MAX_LENGTH = 10_000_000
MAX_REQUESTS = 5_000_000
_SUFFIXES = (".csv", ".jsonl")
_FORM = "serve:isl=1024,osl=512[,concurrency=64 or rate=20], or serve:LOG.csv (or .jsonl) with isl, osl and arrival"


class ServingLoad(Part):
    """Requests of one length; of a log the means. Neither concurrency nor rate: as many as the devices can take."""

    isl: int = Field(ge=1, le=MAX_LENGTH, description="input tokens of a request")
    osl: int = Field(ge=1, le=MAX_LENGTH, description="output tokens of a request")
    concurrency: int | None = Field(None, ge=1, le=10_000_000, description="requests in flight, over all replicas")
    rate: float | None = Field(None, gt=0, le=1e9, description="requests per second, over all replicas")
    longest: int | None = Field(None, ge=2, description="of a log: input and output tokens of its longest request")
    requests: int | None = Field(None, ge=1, description="of a log: how many")
    source: str = Field("", description="of a log: its path")

    @model_validator(mode="after")
    def _one(self) -> "ServingLoad":
        if self.concurrency is not None and self.rate is not None:
            raise ValueError("give concurrency or rate, not both")
        return self

    @property
    def most_tokens(self) -> int:
        """Tokens that the cache of one request holds at its end, of the longest one."""
        return self.longest or self.isl + self.osl

    def __str__(self) -> str:
        more = f",concurrency={self.concurrency}" if self.concurrency else f",rate={self.rate:g}" if self.rate else ""
        return f"{PREFIX}isl={self.isl},osl={self.osl}{more}"


def is_serving(text: str) -> bool:
    """Whether a text of ``--workload`` is of this form."""
    return text.strip().startswith(PREFIX)


def parse_load(text: str) -> ServingLoad:
    """From ``serve:isl=1024,osl=512,concurrency=64`` or ``serve:PATH`` of a log. Raises MoeplanError."""
    body = text.strip().removeprefix(PREFIX)
    if body.lower().endswith(_SUFFIXES):
        return read_log(body)
    found: dict[str, Any] = {}
    for part in body.split(","):
        match = re.fullmatch(r"\s*(isl|osl|concurrency|rate)=([0-9]{1,10}(?:\.[0-9]{1,6})?)\s*", part)
        if match is None or match[1] in found or (match[1] != "rate" and "." in match[2]):
            raise MoeplanError(f"workload {show(text)}: expected {_FORM}")
        found[match[1]] = float(match[2]) if match[1] == "rate" else int(match[2])
    if not {"isl", "osl"} <= found.keys() or {"concurrency", "rate"} <= found.keys():
        raise MoeplanError(f"workload {show(text)}: expected {_FORM}")
    if min(found.values()) <= 0 or max(found["isl"], found["osl"]) > MAX_LENGTH:
        raise MoeplanError(f"workload {show(text)}: every number above 0, lengths of at most {MAX_LENGTH:,} tokens")
    return ServingLoad(**found)


def read_log(path: str) -> ServingLoad:
    """A log of requests: isl and osl in tokens, arrival in seconds (of all or of none). Raises DocumentError."""
    text = read_text(path)
    rows = _csv(text, path) if path.lower().endswith(".csv") else _jsonl(text, path)
    isl = osl = longest = count = 0
    first, last, timed = float("inf"), float("-inf"), 0
    for where, row in islice(rows, MAX_REQUESTS + 1):
        count += 1
        lengths = [_whole(row, name, where) for name in ("isl", "osl")]
        isl, osl, longest = isl + lengths[0], osl + lengths[1], max(longest, sum(lengths))
        if row.get("arrival") not in (None, ""):
            at = _number(row["arrival"], where)
            first, last, timed = min(first, at), max(last, at), timed + 1
    if not 1 <= count <= MAX_REQUESTS:
        raise DocumentError(f"{path}: {'no' if not count else 'too many'} requests, expected 1 to {MAX_REQUESTS:,}")
    if timed not in (0, count):
        raise DocumentError(f"{path}: {timed} of {count} requests have an arrival: give it for all or for none")
    rate = (count - 1) / (last - first) if timed > 1 and last > first else None
    return ServingLoad(
        isl=max(1, round(isl / count)),
        osl=max(1, round(osl / count)),
        rate=rate,
        longest=longest,
        requests=count,
        source=path,
    )


def _csv(text: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text))
    try:
        if not {"isl", "osl"} <= set(reader.fieldnames or ()):
            raise DocumentError(f"{path}: line 1: expected a header with isl, osl and, if known, arrival")
        for row in reader:
            yield f"{path}: line {reader.line_num}", row
    except csv.Error as error:
        raise DocumentError(f"{path}: line {reader.line_num}: no CSV ({error})") from None


def _jsonl(text: str, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    lines: Iterable[str] = text.splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise DocumentError(f"{where}: expected a JSON object with isl, osl and, if known, arrival")
        yield where, row


def _whole(row: dict[str, Any], name: str, where: str) -> int:
    value = row.get(name)
    if isinstance(value, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_LENGTH:
        raise DocumentError(f"{where}: {name}: expected whole tokens from 1 to {MAX_LENGTH:,} (got {show(value)})")
    return value


def _number(value: Any, where: str) -> float:
    try:
        found = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else float("nan")
    except (ValueError, OverflowError):
        found = float("nan")
    if not abs(found) <= 1e12:
        raise DocumentError(f"{where}: arrival: expected seconds (got {show(value)})")
    return found

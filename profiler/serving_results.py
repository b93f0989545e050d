"""Measured times of a served model, from what benchmarks of engines write.

| file | from | read |
|---|---|---|
| JSON, JSON lines | vLLM 0.33 ``vllm bench serve --save-result`` (or ``--append-result``), SGLang 0.5 ``bench_serving`` | ``completed``, ``total_input_tokens``, ``total_output_tokens``, ``max_concurrency``, ``mean_ttft_ms``, ``mean_tpot_ms`` |
| CSV | NVIDIA genai-perf's ``profile_export_genai_perf.csv`` | rows Time To First Token, Inter Token Latency, Input and Output Sequence Length; Request Latency and Throughput |
| CSV | anybody | columns isl, osl, concurrency, ttft_ms, tpot_ms |

Lengths are means over requests. Where a file does not tell how many requests were in flight, that is their rate times
their mean latency (Little's law), or what the user says.
"""  # noqa: E501

import csv
import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..spec.calibration import MAX_POINTS, ServedTimes
from ..spec.document import describe, read_text, show
from ..spec.errors import DocumentError
from ..spec.texts import parse_json

MAX_BYTES = 64 * 2**20
COLUMNS = ("isl", "osl", "concurrency", "ttft_ms", "tpot_ms")
_ENGINE = ("completed", "total_input_tokens", "total_output_tokens")
_GENAI = {
    "isl": "Input Sequence Length (tokens)",
    "osl": "Output Sequence Length (tokens)",
    "ttft_ms": "Time To First Token (ms)",
    "tpot_ms": "Inter Token Latency (ms)",
    "latency_ms": "Request Latency (ms)",
}
_RATES = ("Request Throughput (per sec)", "Request Throughput (requests/sec)")


def read_served(path: str | Path, concurrency: int | None = None) -> list[ServedTimes]:
    """Every measurement of a file, in its order. concurrency: where the file does not tell it.

    Raises DocumentError, one line, for a file of none of the forms above.
    """
    text, where = read_text(path, limit=MAX_BYTES), str(path)
    start = text.lstrip("\ufeff \t\r\n")
    if start[:1] in ("{", "["):
        found = [_engine(entry, at, concurrency) for at, entry in _entries(start, where)]
    elif start.startswith("Metric,"):
        found = [_genai(start, where, concurrency)]
    else:
        found = list(_plain(start, where))
    if not found:
        raise DocumentError(f"{where}: holds no measurement")
    if len(found) > MAX_POINTS:
        raise DocumentError(f"{where}: {len(found):,} measurements, at most {MAX_POINTS:,} are read")
    return found


def _entries(text: str, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """JSON objects, and what names each: one, a list of them, or one a line."""
    try:
        whole = parse_json(text, where)
        entries = whole if isinstance(whole, list) else [whole]
        named = [(where, entry) for entry in entries]
    except DocumentError as error:
        lines = [(f"{where}, line {i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        if len(lines) < 2:
            raise error from None
        named = [(at, parse_json(line, at)) for at, line in lines]
    for at, entry in named:
        if not isinstance(entry, dict):
            raise DocumentError(f"{at}: expected the object that an engine's benchmark writes, got {show(entry)}")
        yield at, entry


def _engine(entry: Mapping[str, Any], where: str, concurrency: int | None) -> ServedTimes:
    """What vLLM's and SGLang's benchmarks write."""
    missing = [name for name in _ENGINE if name not in entry]
    if missing:
        raise DocumentError(
            f"{where}: {', '.join(missing)} missing: expected what `vllm bench serve --save-result` or SGLang's "
            f"bench_serving writes, or a CSV with columns {', '.join(COLUMNS)}"
        )
    completed = _number(entry["completed"], "completed", where)
    if completed < 1:
        raise DocumentError(f"{where}: completed: no request was completed")
    at_once = concurrency or entry.get("max_concurrency") or entry.get("concurrency")
    if at_once is None and "request_throughput" in entry and "mean_e2el_ms" in entry:
        rate, latency = (_number(entry[k], k, where) for k in ("request_throughput", "mean_e2el_ms"))
        at_once = max(1.0, rate * latency / 1e3)
    if at_once is None:
        raise DocumentError(f"{where}: max_concurrency is not told: run with --max-concurrency, or pass --concurrency")
    fields = {
        "isl": _number(entry["total_input_tokens"], "total_input_tokens", where) / completed,
        "osl": _number(entry["total_output_tokens"], "total_output_tokens", where) / completed,
        "concurrency": _number(at_once, "max_concurrency", where),
    }
    for ours, theirs in (("ttft_ms", "mean_ttft_ms"), ("tpot_ms", "mean_tpot_ms")):
        if entry.get(theirs):
            fields[ours] = _number(entry[theirs], theirs, where)
    return _times(fields, where)


def _genai(text: str, where: str, concurrency: int | None) -> ServedTimes:
    """genai-perf's table: metric, then its mean; numbers have thousands separators."""
    rows = {row[0].strip(): row[1] for row in csv.reader(io.StringIO(text)) if len(row) > 1}
    wanted = ("isl", "osl", "ttft_ms", "tpot_ms")
    missing = [_GENAI[name] for name in wanted if _GENAI[name] not in rows]
    if missing:
        raise DocumentError(f"{where}: rows missing: {'; '.join(missing)} (run genai-perf with --streaming)")
    fields = {name: _number(rows[_GENAI[name]].replace(",", ""), _GENAI[name], where) for name in wanted}
    rate = next((rows[name] for name in _RATES if name in rows), None)
    if concurrency is not None:
        fields["concurrency"] = float(concurrency)
    elif rate is not None and _GENAI["latency_ms"] in rows:
        latency = _number(rows[_GENAI["latency_ms"]].replace(",", ""), _GENAI["latency_ms"], where)
        fields["concurrency"] = max(1.0, _number(rate.replace(",", ""), _RATES[0], where) * latency / 1e3)
    else:
        raise DocumentError(f"{where}: how many requests were in flight is not told: pass --concurrency")
    return _times(fields, where)


def _plain(text: str, where: str) -> Iterator[ServedTimes]:
    rows = csv.DictReader(io.StringIO(text))
    try:
        names = [name.strip().lower() for name in rows.fieldnames or ()]
        missing = [name for name in COLUMNS[:3] if name not in names]
        if missing or not set(COLUMNS[3:]) & set(names):
            shown = show(", ".join(names))
            raise DocumentError(
                f"{where}: columns {', '.join(COLUMNS[:3])} and one or both of {', '.join(COLUMNS[3:])} are wanted, "
                f"got {shown}; files of `vllm bench serve --save-result`, SGLang's bench_serving and genai-perf are "
                "read too"
            )
        rows.fieldnames = names
        for row in rows:
            at = f"{where}, line {rows.line_num}"
            if None in row:
                raise DocumentError(f"{at}: more cells than columns")
            cells = {name: row[name] for name in COLUMNS if row.get(name)}
            yield _times({name: _number(cell, name, at) for name, cell in cells.items()}, at)
    except csv.Error as error:
        raise DocumentError(f"{where}: not CSV ({error})") from None


def _number(value: Any, name: str, where: str) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and 0 <= number < 1e12):
        raise DocumentError(f"{where}: {name}: expected a number from 0, got {show(value)}")
    return number


def _times(fields: Mapping[str, float], where: str) -> ServedTimes:
    """Lengths and concurrency as whole numbers, at least 1."""
    whole = {name: max(1, round(fields[name])) for name in COLUMNS[:3] if fields.get(name)}
    times = {name: fields[name] for name in COLUMNS[3:] if fields.get(name)}
    try:
        return ServedTimes.model_validate(whole | times)
    except ValidationError as error:
        raise DocumentError(f"{where}: {describe(error)}") from None

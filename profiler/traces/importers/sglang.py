"""SGLang's expert distribution recorder: files of `torch.save`, one per rank and recording, or the same as JSON.

- stat, stat_approx: ``{rank, logical_count: int32 [steps, L, E], ...}``, summed over ranks by SGLang; the steps are a
  circular buffer whose unused ones are zero. Averages are floats; people also keep the bare tensor or JSON.
- per_pass: ``{records: [{forward_pass_id, rank, gatherer_key, global_physical_count [L, P]}],
  last_physical_to_logical_map [L, P]}``, each rank counting the tokens that it saw.
- per_token: the same with input_ids, positions, extend_seq_lens and topk_ids_of_layer [L, T, 8], physical ids padded
  with -1.

Routed experts that SGLang returns with each answer are JSON, see requests.py.
Source: sglang/srt/eplb/expert_distribution.py, 0.5.23.
Shape letters: L layers, E experts, P physical experts, T tokens, K top-k.
"""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ....spec.document import show
from ....spec.errors import DocumentError
from ....spec.trace import Trace
from .counts import map_back, read_map, summed
from .files import read_torch, recording, to_array
from .json_files import depth_of, read_bodies
from .options import Options
from .ranks import Record, merge_ranks
from .records import UNORDERED, add_counts, counts_trace, limit_choices, tokens_trace
from .requests import answers_of, answers_trace

MAP = "last_physical_to_logical_map"
JSON = (".json", ".jsonl")

Contents = list[tuple[str, dict[Any, Any]]]


def recognise(content: object) -> bool:
    """Whether a loaded file is the recorder's."""
    return isinstance(content, dict) and ("logical_count" in content or "records" in content)


def read(path: Path, options: Options) -> tuple[Trace, list[str]]:
    """A recorder file, or the folder with all files of a recording; or JSON of answers with routed experts."""
    notes: list[str] = []
    contents: Contents = []
    kinds = JSON if path.is_dir() and not any(path.glob("*.pt")) else (".pt",)
    for file in recording(path, kinds):
        if file.suffix not in JSON:
            contents.append((str(file), _content(read_torch(file), str(file), notes)))
            continue
        bodies = read_bodies(file)
        where, body = next(bodies)
        if not recognise(body) and not _is_table(body):
            answers = answers_of(chain([(where, body)], bodies), notes, str(file))
            if contents:
                raise DocumentError(f"{path}: answers of requests beside recordings: import them apart")
            source = "SGLang routed experts"
            return answers_trace(answers, notes, options=options, where=str(path), source=source), notes
        contents += [(place, _content(each, place, notes)) for place, each in chain([(where, body)], bodies)]
    statistics = ["logical_count" in content for _, content in contents]
    if any(statistics) and not all(statistics):
        raise DocumentError(f"{path}: statistics (logical_count) beside records: import one recording at a time")
    if all(statistics):
        return _read_statistics(path, contents, options, notes), notes
    return _read_records(path, contents, options, notes), notes


def _is_table(body: Any) -> bool:
    """Lists [layers, experts], or floats in lists of any depth: counts without their name, never expert ids."""
    depth = depth_of(body)
    inner = body
    for _ in range(depth):
        inner = inner[0] if inner else None
    return (depth == 2 and type(inner) in (int, float)) or (depth == 3 and type(inner) is float)


def _content(content: object, where: str, notes: list[str]) -> dict[Any, Any]:
    """The recorder's dictionary; a bare tensor or table is its logical_count."""
    if isinstance(content, Tensor) or _is_table(content):
        notes.append(f"{Path(where).name}: bare numbers, taken for logical_count [layers, experts] or its steps")
        return {"logical_count": content}
    if not isinstance(content, dict) or not recognise(content):
        raise DocumentError(f"{where}: not SGLang's recorder: neither logical_count nor records")
    return content


def _read_statistics(path: Path, contents: Contents, options: Options, notes: list[str]) -> Trace:
    total: np.ndarray | None = None
    seen: set[bytes] = set()
    for where, content in contents:
        value, name = content["logical_count"], Path(where).name
        counts, steps = summed(value, f"{where}: logical_count")
        if counts.tobytes() in seen:
            notes.append(f"{name}: the same counts as another file (SGLang sums over ranks itself): counted once")
            continue
        seen.add(counts.tobytes())
        if steps is not None:
            used = int(to_array(value, where, "iuf").any(axis=(1, 2)).sum())
            full = "; it may have wrapped, earlier passes are then lost" if used == steps else ", the rest is unused"
            notes.append(f"{name}: {used} of {steps} steps of the circular buffer hold counts{full}")
        total = add_counts(total, counts, f"{where}: logical_count")
    assert total is not None
    if len(seen) > 1:
        notes.append(f"{len(seen)} recordings with different counts: summed")
    return counts_trace(total, notes, options=options, where=str(path), source="SGLang recorder, stat")


def _read_records(path: Path, contents: Contents, options: Options, notes: list[str]) -> Trace:
    records: list[Record] = []
    experts, moved = set(), False
    for file, content in contents:
        if content.get(MAP) is None:
            raise DocumentError(f"{file}: {MAP} is missing: physical ids cannot be mapped back")
        logical = read_map(content[MAP], f"{file}: {MAP}")
        experts.add(int(logical.max()) + 1)
        moved |= bool((logical != np.arange(logical.shape[1])).any())
        if not isinstance(content["records"], list):
            raise DocumentError(f"{file}: records: expected a list, got {show(content['records'])}")
        records += [_record(body, logical, f"{file}: records[{i}]") for i, body in enumerate(content["records"])]
        limit_choices(0, sum(record.values.size for record in records if record.values.ndim == 3), str(path))
    if not records:
        raise DocumentError(f"{path}: zero records: SGLang recorded no forward pass")
    if len(experts) > 1:
        raise DocumentError(f"{path}: files of {sorted(experts)} experts: not one recording")
    if len({record.values.ndim for record in records}) > 1:
        raise DocumentError(f"{path}: per_token beside per_pass records: import one recording at a time")
    if len({record.values.shape[-2] for record in records}) > 1:
        raise DocumentError(f"{path}: records of different numbers of layers: not one model's")
    if moved:
        notes.append(
            "physical ids mapped back to logical ones by the map at the end of the recording: right only if SGLang "
            "did not rebalance meanwhile"
        )
    kept = merge_ranks(records, str(path), notes)
    number = experts.pop()
    if kept[0].values.ndim == 2:
        total: np.ndarray | None = None
        for record in kept:
            total = add_counts(total, record.values, str(path))
        assert total is not None
        notes.append(f"{len({record.forward_pass for record in kept})} forward passes summed")
        return counts_trace(total, notes, options=options, where=str(path), source="SGLang recorder, per_pass")
    if len({record.values.shape[2] for record in kept}) > 1:
        raise DocumentError(f"{path}: topk_ids_of_layer of different widths: not one recording")
    ids = np.concatenate([record.values for record in kept])
    width = ids.shape[2]
    lengths = np.concatenate([record.lengths for record in kept])
    if any(record.decoding for record in kept):
        notes.append("decoded tokens are not tied to their request in the record: each is a sequence of its own")
    trace = tokens_trace(
        ids, lengths, notes, options=options, where=str(path), source="SGLang recorder, per_token", num_experts=number
    )
    if not trace.counts_only and trace.top_k < width:
        notes.append(f"the file has {width} places for experts per token, {trace.top_k} are used: -1 padding dropped")
    notes.append(f"SGLang: {UNORDERED}")
    return trace


def _record(body: object, logical: np.ndarray, where: str) -> Record:
    """One rank's record of one forward pass, in logical experts: ids [T, L, K] or counts [L, E]."""
    if not isinstance(body, dict):
        raise DocumentError(f"{where}: expected a dictionary, got {show(body)}")
    forward_pass, rank = (_integer(body, name, where) for name in ("forward_pass_id", "rank"))
    key = body.get("gatherer_key", "")
    if not isinstance(key, str):
        raise DocumentError(f"{where}.gatherer_key: expected a text, got {show(key)}")
    if "topk_ids_of_layer" not in body:
        counts = _logical_counts(body.get("global_physical_count"), logical, f"{where}.global_physical_count")
        return Record(forward_pass, rank, key, counts, counts.tobytes() if counts.any() else b"")
    inputs, positions = (_integers(body.get(name), f"{where}.{name}") for name in ("input_ids", "positions"))
    ids = _logical_ids(body["topk_ids_of_layer"], logical, f"{where}.topk_ids_of_layer")
    tokens = len(ids)
    if inputs.shape != (tokens,) or positions.shape[-1:] != (tokens,):
        raise DocumentError(
            f"{where}: {inputs.size} input_ids and {positions.size} positions for {tokens} tokens of topk_ids_of_layer"
        )
    lengths, decoding = _lengths(body.get("extend_seq_lens"), tokens, f"{where}.extend_seq_lens")
    identity = inputs.tobytes() + positions.tobytes() if tokens else b""
    return Record(forward_pass, rank, key, ids, identity, lengths, decoding)


def _logical_counts(value: object, logical: np.ndarray, where: str) -> np.ndarray:
    counts = to_array(value, where, "iu")
    if counts.shape != logical.shape:
        raise DocumentError(f"{where}: expected {list(logical.shape)} as {MAP}, got {list(counts.shape)}")
    return map_back(add_counts(None, counts, where), logical)


def _logical_ids(value: object, logical: np.ndarray, where: str) -> np.ndarray:
    ids = to_array(value, where, "iu")
    layers, physical = logical.shape
    if ids.ndim != 3 or len(ids) != layers or ids.shape[2] == 0:
        raise DocumentError(f"{where}: expected [{layers} layers, tokens, top_k], got {list(ids.shape)}")
    if ids.size and (ids.min() < -1 or ids.max() >= physical):
        raise DocumentError(
            f"{where}: expected -1..{physical - 1}, found {ids.min()}..{ids.max()}; record with "
            "--disable-shared-experts-fusion if the model has shared experts"
        )
    found = logical[np.arange(layers)[:, None, None], np.maximum(ids, 0)]
    return np.where(ids < 0, np.int32(-1), found).transpose(1, 0, 2)


def _lengths(value: object, tokens: int, where: str) -> tuple[np.ndarray, bool]:
    """Tokens of each sequence, and whether some are decoded: those, and padding, are sequences of one."""
    if value is None:
        return np.ones(tokens, np.int64), tokens > 0
    lengths = _integers(value, where)
    if lengths.ndim != 1 or (lengths < 0).any() or (lengths > tokens).any() or lengths.sum() > tokens:
        raise DocumentError(f"{where}: expected lengths of at most {tokens} tokens in all, got {show(value)}")
    rest = tokens - int(lengths.sum())
    return np.concatenate([lengths[lengths > 0], np.ones(rest, np.int64)]), False


def _integers(value: object, where: str) -> np.ndarray:
    """A list of integers, or a tensor."""
    if isinstance(value, Tensor):
        return to_array(value, where, "iu").astype(np.int64)
    if not isinstance(value, list) or not all(type(item) is int and abs(item) < 2**62 for item in value):
        raise DocumentError(f"{where}: expected a list of integers, got {show(value)}")
    return np.array(value, np.int64)


def _integer(body: dict[Any, Any], name: str, where: str) -> int:
    value = body.get(name)
    if type(value) is not int or abs(value) >= 2**62:
        raise DocumentError(f"{where}.{name}: expected an integer, got {show(value)}")
    return value

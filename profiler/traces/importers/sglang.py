"""SGLang's expert distribution recorder: files of `torch.save`, one per rank and recording.

- stat, stat_approx: ``{rank, logical_count: int32 [steps, L, E], ...}``, summed over ranks by SGLang; the steps are a
  circular buffer whose unused ones are zero.
- per_pass: ``{records: [{forward_pass_id, rank, gatherer_key, global_physical_count [L, P]}],
  last_physical_to_logical_map [L, P]}``, each rank counting the tokens that it saw.
- per_token: the same with input_ids, positions, extend_seq_lens and topk_ids_of_layer [L, T, 8], physical ids padded
  with -1.

Routed experts that SGLang returns with each answer are JSON, see requests.py.
Source: sglang/srt/eplb/expert_distribution.py.
Shape letters: L layers, E experts, P physical experts, T tokens, K top-k.
"""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ....spec.document import show
from ....spec.errors import DocumentError
from ....spec.model import MAX_EXPERTS
from ....spec.trace import Trace
from .files import file_size, read_torch, recording, to_array
from .ranks import Record, merge_ranks
from .records import UNORDERED, Options, add_counts, counts_trace, tokens_trace
from .requests import answers_trace, read_answers

MAP = "last_physical_to_logical_map"


def recognise(content: object) -> bool:
    """Whether a loaded file is the recorder's."""
    return isinstance(content, dict) and ("logical_count" in content or "records" in content)


def read(path: Path, options: Options) -> tuple[Trace, list[str]]:
    """A recorder file, or the folder with all files of a recording; or JSON of answers with routed experts."""
    notes: list[str] = []
    if path.suffix in (".json", ".jsonl"):
        file_size(path)
        source = "SGLang routed experts"
        return answers_trace(read_answers(path), notes, options=options, where=str(path), source=source), notes
    files = recording(path, (".pt",))
    contents = []
    for file in files:
        content = read_torch(file)
        if not isinstance(content, dict) or not recognise(content):
            raise DocumentError(f"{file}: not SGLang's recorder: neither logical_count nor records")
        contents.append((file, content))
    statistics = ["logical_count" in content for _, content in contents]
    if any(statistics) and not all(statistics):
        raise DocumentError(f"{path}: statistics (logical_count) beside records: import one recording at a time")
    if all(statistics):
        return _read_statistics(path, contents, options, notes), notes
    return _read_records(path, contents, options, notes), notes


def _read_statistics(
    path: Path, contents: list[tuple[Path, dict[Any, Any]]], options: Options, notes: list[str]
) -> Trace:
    total: np.ndarray | None = None
    seen: set[bytes] = set()
    for file, content in contents:
        counts = to_array(content["logical_count"], f"{file}: logical_count", "iu")
        if counts.ndim not in (2, 3) or 0 in counts.shape or counts.shape[-1] > MAX_EXPERTS:
            raise DocumentError(f"{file}: logical_count: expected [steps, layers, experts], got {list(counts.shape)}")
        if counts.tobytes() in seen:
            notes.append(f"{file.name}: the same counts as another file (SGLang sums over ranks itself): counted once")
            continue
        seen.add(counts.tobytes())
        if counts.ndim == 3:
            used, steps = int(counts.any(axis=(1, 2)).sum()), len(counts)
            full = "; it may have wrapped, earlier passes are then lost" if used == steps else ", the rest is unused"
            notes.append(f"{file.name}: {used} of {steps} steps of the circular buffer hold counts{full}")
            if counts.min() < 0:
                raise DocumentError(f"{file}: logical_count: a negative count ({counts.min()})")
            counts = counts.sum(axis=0, dtype=np.float64)
        total = add_counts(total, counts, f"{file}: logical_count")
    assert total is not None
    if len(seen) > 1:
        notes.append(f"{len(seen)} recordings with different counts: summed")
    return counts_trace(total, notes, options=options, where=str(path), source="SGLang recorder, stat")


def _read_records(path: Path, contents: list[tuple[Path, dict[Any, Any]]], options: Options, notes: list[str]) -> Trace:
    records: list[Record] = []
    experts, moved = set(), False
    for file, content in contents:
        logical = _map(content.get(MAP), file)
        experts.add(int(logical.max()) + 1)
        moved |= bool((logical != np.arange(logical.shape[1])).any())
        if not isinstance(content["records"], list):
            raise DocumentError(f"{file}: records: expected a list, got {show(content['records'])}")
        records += [_record(body, logical, f"{file}: records[{i}]") for i, body in enumerate(content["records"])]
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
    if trace.top_k < width:
        notes.append(f"the file has room for {width} experts per token, {trace.top_k} are used: -1 padding dropped")
    notes.append(f"SGLang: {UNORDERED}")
    return trace


def _map(value: object, file: Path) -> np.ndarray:
    """[L, P] logical expert of every physical one, checked."""
    if value is None:
        raise DocumentError(f"{file}: {MAP} is missing: physical ids cannot be mapped back")
    logical = to_array(value, f"{file}: {MAP}", "iu")
    if logical.ndim != 2 or 0 in logical.shape:
        raise DocumentError(f"{file}: {MAP}: expected [layers, physical experts], got {list(logical.shape)}")
    if logical.min() < 0 or int(logical.max()) >= min(logical.shape[1], MAX_EXPERTS):
        raise DocumentError(
            f"{file}: {MAP}: expected experts in 0..{min(logical.shape[1], MAX_EXPERTS) - 1}, found "
            f"{int(logical.min())}..{int(logical.max())}"
        )
    return logical.astype(np.int32)


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
    if counts.min() < 0:
        raise DocumentError(f"{where}: a negative count ({counts.min()})")
    found = np.zeros((len(logical), int(logical.max()) + 1))
    np.add.at(found, (np.arange(len(logical))[:, None], logical), counts)
    return found


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

"""The folder of ``moeplan watch``: who owns it, what was decided, and the state that a restart goes on from.

    place.json    the placement that should serve now
    ...           the engine's files of it
    log.jsonl     a line for each decision, only ever appended to
    state.npz     replaced as a whole after every recording that was read
    lock          held while a watcher runs

A decision is written in this order: the placement, the engine's files, the state, the log. Whoever dies in between does
it again from the state before, or finds in the state the line that the log misses: no decision is made or told twice.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..planner.rebalance.state import pack, unpack
from ..planner.rebalance.watcher import Rules, Watcher
from ..profiler.traces.follow import Follower, Mark
from ..spec.arrays import read_npz
from ..spec.document import parse_object
from ..spec.errors import DocumentError, MoeplanError
from ..spec.output import check_output, write_atomically
from ..spec.placement import Placement

VERSION = 1
MAX_STATE_BYTES = 2**31
STATE, LOG, LOCK, PLACE = "state.npz", "log.jsonl", "lock", "place.json"
MISFIT = "name another --output, or remove the folder to begin anew"


@dataclass
class Saved:
    """What the state holds. first: digest of the placement that it all began with; decisions: how many were made;
    told: the last line of the log."""

    watcher: Watcher
    follower: Follower
    placement: Placement
    first: str
    decisions: int = 0
    told: dict[str, Any] = field(default_factory=dict)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Make the folder, and hold it: one watcher at a time. Raises MoeplanError, at once, where another one has it."""
    check_output(folder / STATE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise DocumentError(f"{folder}: cannot be written ({error.strerror or error})") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise MoeplanError(f"{folder}: another watch writes there: stop it, or name another --output") from None
    except OSError as error:
        os.close(descriptor)
        raise MoeplanError(f"{folder}: cannot be locked ({error.strerror}): name a folder of a local disk") from None
    try:
        yield
    finally:
        os.close(descriptor)


def save(folder: Path, saved: Saved) -> None:
    """Replace the state. Raises DocumentError; the one before is then still there."""
    follower = saved.follower
    facts = {
        "version": VERSION,
        "first": saved.first,
        "placement": saved.placement.to_json(),
        "read": follower.read,
        "refused": follower.refused,
        "counted": follower.counted,
        "decisions": saved.decisions,
        "told": saved.told,
    }
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    arrays: dict[str, Any] = {"facts": text, **pack(saved.watcher)}
    write_atomically(folder / STATE, lambda f: np.savez_compressed(f, **arrays))


def restore(folder: Path, recordings: Path, kind: str | None, rules: Rules, given: Placement | None) -> Saved | None:
    """What an earlier watch left in the folder; None where there was none.

    given: the placement named now, which must be the one that the state began with, or the one that serves by now.
    Raises MoeplanError where the state is damaged, or of something else.
    """
    path = folder / STATE
    if not path.exists():
        return None
    arrays = read_npz(path, MAX_STATE_BYTES, hint=f": {MISFIT}")
    facts = _facts(arrays.pop("facts", None), str(path))
    placement = Placement.parse(facts["placement"], f"{path}: placement")
    if given is not None and given.digest() not in (facts["first"], placement.digest()):
        raise MoeplanError(f"{folder}: its state began with another placement: {MISFIT}")
    shape = (len(placement.layers), placement.num_experts)
    try:
        watcher = unpack(arrays, rules, *shape)
    except ValueError as error:
        raise DocumentError(f"{path}: damaged ({error}): {MISFIT}") from None
    follower = Follower(recordings, kind, shape, facts["read"], facts["refused"], facts["counted"])
    return Saved(watcher, follower, placement, facts["first"], facts["decisions"], facts["told"])


def _facts(array: np.ndarray | None, where: str) -> dict[str, Any]:
    """The part of the state that is JSON, checked."""
    damaged = DocumentError(f"{where}: damaged, or of another version of moeplan: {MISFIT}")
    if array is None or array.ndim != 1 or array.dtype != np.uint8:
        raise damaged
    try:
        facts = parse_object(array.tobytes().decode(), where)
    except UnicodeDecodeError:
        raise damaged from None
    kinds = {"first": str, "placement": str, "read": dict, "refused": dict, "counted": list, "decisions": int}
    if facts.get("version") != VERSION or not all(type(facts.get(n)) is t for n, t in kinds.items()):
        raise damaged
    if type(facts.get("told")) is not dict or not all(type(one) is str for one in facts["counted"]):
        raise damaged
    for name in ("read", "refused"):
        facts[name] = {key: _mark(value, damaged) for key, value in facts[name].items()}
    return facts


def _mark(value: object, damaged: DocumentError) -> Mark:
    if not isinstance(value, list) or len(value) != 3 or not all(type(item) is int for item in value):
        raise damaged
    return value[0], value[1], value[2]


def tell(folder: Path, saved: Saved) -> None:
    """Append the last decision to the log, if it is not there. Raises DocumentError."""
    path = folder / LOG
    number, whole = _last(path)
    if not saved.told or number >= saved.decisions:
        return
    line = ("" if whole else "\n") + json.dumps(saved.told, allow_nan=False) + "\n"
    try:
        with open(path, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DocumentError(f"{path}: cannot be written ({error.strerror or error})") from None


def _last(path: Path) -> tuple[int, bool]:
    """Number of the last decision in the log, 0 where there is none; and whether its last line is whole, which it is
    not where the disk was full."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
            tail = file.read()
    except OSError:
        return 0, True
    for line in reversed(tail.splitlines()):
        try:
            number = json.loads(line)["decision"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if type(number) is int:
            return number, tail.endswith(b"\n")
    return 0, not tail or tail.endswith(b"\n")

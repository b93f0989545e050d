"""Trace: how a model really routes, token by token and layer by layer."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import read_npz
from .document import write_atomically
from .errors import DocumentError
from .model import MAX_EXPERTS, MAX_LAYERS

MAX_TRACE_BYTES = 2 * 2**30
MAX_CHOICES = 2**26
"""Tokens x layers x top-k: 144,000 tokens of DeepSeek-V3. More make a placement no better, and take gigabytes."""
MAX_COUNTS = 2**22
"""Layers x experts."""
MAX_LOAD, MIN_LOAD = 2.0**53, 1e-9
"""Tokens that a layer's counts sum to, beside 0: what a float holds exactly, and what its square does not lose."""
MAX_TEXT = 4096
WHOLE_SEQUENCES = 3  # a trace of more sequences is divided between them, of fewer inside them
# Bytes that an array of the file may have: numbers have at most 8 each.
_FIELDS = {
    **dict.fromkeys(("expert_ids", "expert_weights", "seq_len"), 8 * MAX_CHOICES),
    **dict.fromkeys(("num_experts", "zero_experts", "model", "source"), 2**20),
    "expert_counts": 8 * MAX_COUNTS,
}
FEW_CHOICES = 16
_PIECE = 2**20  # choices that are looked at at a time


@dataclass(frozen=True)
class Trace:
    """Recorded routing.

    expert_ids: [tokens, layers, top_k] integers, highest gate weight first; rows aligned across layers. Where the model
    has ``zero_experts``, identity experts beside its ``num_experts``, a choice of one of them is -1.
    expert_weights: [tokens, layers, top_k] float32 gate weights, in the same order.
    seq_len: [sequences] integers, tokens of each sequence in order, summing to ``tokens``.
    expert_counts: [layers, experts] float64; the only content of a counts-only trace (expert_ids is then empty).
    """

    expert_ids: np.ndarray
    expert_weights: np.ndarray
    seq_len: np.ndarray
    num_experts: int
    expert_counts: np.ndarray
    model: str = ""
    source: str = ""
    zero_experts: int = 0

    @property
    def counts_only(self) -> bool:
        return self.expert_ids.size == 0

    @property
    def tokens(self) -> int:
        return len(self.expert_ids)

    @property
    def layers(self) -> int:
        return self.expert_counts.shape[0]

    @property
    def top_k(self) -> int:
        return self.expert_ids.shape[2]

    def digest(self) -> str:
        """SHA-256 over the routing itself."""
        zero = f" {self.zero_experts}" if self.zero_experts else ""
        h = hashlib.sha256(f"{self.num_experts} {self.expert_ids.shape} {self.expert_counts.shape}{zero}".encode())
        for ids in _pieces(self.expert_ids):
            h.update(np.ascontiguousarray(ids, dtype=np.int64).data)
        h.update(np.ascontiguousarray(self.expert_counts, dtype=np.float64).tobytes())
        h.update(np.ascontiguousarray(self.seq_len, dtype=np.int64).tobytes())
        return h.hexdigest()[:16]

    @property
    def tells_movement(self) -> bool:
        """Whether it says what moves between experts: token by token, each with experts that have weights in every
        layer, which no token of a model with identity experts needs to have."""
        return not self.counts_only and not self.zero_experts

    def for_placement(self) -> "Trace":
        """What a placement by itself is planned and scored on: where movement is not told, the counts."""
        if self.counts_only or self.tells_movement:
            return self
        return Trace.of_counts(self.expert_counts, model=self.model, source=self.source)

    def part(self, low: float, high: float) -> "Trace":
        """The tokens between two fractions of the trace, cut at the nearest ends of sequences.

        A trace of at most three sequences is cut inside them: whole ones would be too unequal.
        Counts-only traces have no parts: asking for less than the whole is an error.
        """
        if not 0 <= low < high <= 1:
            raise DocumentError(f"part {low:g}:{high:g} of the trace: expected 0 <= from < to <= 1")
        if (low, high) == (0, 1):
            return self
        first, end = self._cut(low), self._cut(high)
        if first == end:
            raise DocumentError(f"part {low:g}:{high:g} of the trace holds no tokens ({self.tokens} in all)")
        return self._between(first, end)

    def parts(self, count: int) -> list["Trace"]:
        """Consecutive parts of about as many tokens, cut as ``part`` cuts; fewer where sequences are too long."""
        cuts = sorted({self._cut(i / count) for i in range(count + 1)})
        return [self._between(first, end) for first, end in pairwise(cuts)]

    def _cut(self, fraction: float) -> int:
        """The token before which the trace is cut at a fraction of it."""
        if self.counts_only:
            raise DocumentError("a counts-only trace has no tokens to divide: use the whole of it (0:1)")
        cut = round(fraction * self.tokens)
        if len(self.seq_len) > WHOLE_SEQUENCES:
            ends = np.concatenate([[0], np.cumsum(self.seq_len)])
            cut = int(ends[np.abs(ends - cut).argmin()])
        return cut

    def _between(self, first: int, end: int) -> "Trace":
        lengths = np.diff(np.clip(np.concatenate([[0], np.cumsum(self.seq_len)]), first, end))
        ids, lengths = self.expert_ids[first:end], lengths[lengths > 0]  # checked as the whole was
        counts = _counted(ids, self.num_experts)
        weights = self.expert_weights[first:end]
        return Trace(ids, weights, lengths, self.num_experts, counts, self.model, self.source, self.zero_experts)

    @classmethod
    def of(
        cls,
        expert_ids: np.ndarray,
        num_experts: int,
        *,
        zero_experts: int = 0,
        expert_weights: np.ndarray | None = None,
        seq_len: np.ndarray | None = None,
        model: str = "",
        source: str = "",
        where: str = "trace",
    ) -> "Trace":
        """Validate arrays and complete what is optional: even gate weights, one sequence."""
        ids = np.asarray(expert_ids)
        if ids.ndim != 3 or ids.dtype.kind not in "iu" or 0 in ids.shape:
            raise DocumentError(
                f"{where}: expert_ids: expected integers [tokens, layers, top_k], got {ids.dtype} {list(ids.shape)}"
            )
        tokens, layers, top_k = ids.shape
        if ids.size > MAX_CHOICES:
            raise DocumentError(
                f"{where}: {tokens:,} tokens x {layers:,} layers x top-{top_k} are {ids.size:,} choices, at most "
                f"{MAX_CHOICES:,} are read: record or import fewer tokens"
            )
        if num_experts > MAX_EXPERTS:
            raise DocumentError(f"{where}: num_experts: at most {MAX_EXPERTS}, got {num_experts}")
        if num_experts < top_k:
            raise DocumentError(f"{where}: num_experts: {num_experts} experts cannot give top-{top_k}")
        _check_counts(layers, num_experts, where)
        if not 0 <= zero_experts <= MAX_EXPERTS:
            raise DocumentError(f"{where}: zero_experts: expected 0 to {MAX_EXPERTS}, got {zero_experts}")
        if int(ids.min()) < (-1 if zero_experts else 0) or int(ids.max()) >= num_experts:
            identity = ", or be -1 for an identity expert" if zero_experts else ""
            raise DocumentError(
                f"{where}: expert_ids: must lie in 0..{num_experts - 1}{identity}, "
                f"found {int(ids.min())}..{int(ids.max())}"
            )
        if any(_twice(piece) for piece in _pieces(ids)):
            raise DocumentError(f"{where}: expert_ids: a token names one expert twice in a layer")
        even = np.broadcast_to(np.float32(1.0 / top_k), ids.shape)  # of all choices, in the memory of one
        weights = even if expert_weights is None else np.asarray(expert_weights)
        if weights.shape != ids.shape or weights.dtype.kind != "f":
            raise DocumentError(
                f"{where}: expert_weights: expected floats {list(ids.shape)}, got {list(weights.shape)}"
            )
        with np.errstate(over="ignore"):
            weights = weights.astype(np.float32, copy=False)
        if not bool(np.isfinite(weights).all()):
            raise DocumentError(f"{where}: expert_weights: must be finite")
        lengths = np.array([tokens]) if seq_len is None else np.asarray(seq_len)
        # No single length above ``tokens``: a sum of huge ones could wrap around to it.
        fits = lengths.ndim == 1 and lengths.dtype.kind in "iu" and ((lengths > 0) & (lengths <= tokens)).all()
        if not fits or lengths.sum() != tokens:
            raise DocumentError(f"{where}: seq_len: expected positive integers that sum to {tokens} tokens")
        ids = ids.astype(np.int32, copy=False)
        counts = _counted(ids, num_experts)
        return cls(ids, weights, lengths.astype(np.int64), num_experts, counts, model, source, zero_experts)

    @classmethod
    def of_counts(cls, counts: np.ndarray, *, model: str = "", source: str = "", where: str = "trace") -> "Trace":
        """A counts-only trace: balance can be planned with it, affinity cannot."""
        counts = np.asarray(counts)
        if counts.ndim != 2 or 0 in counts.shape or counts.dtype.kind not in "iuf" or counts.shape[1] > MAX_EXPERTS:
            raise DocumentError(
                f"{where}: expert_counts: expected numbers [layers, experts], got {counts.dtype} {list(counts.shape)}"
            )
        counts = counts.astype(float)
        if not bool(np.isfinite(counts).all()) or (counts < 0).any():
            raise DocumentError(f"{where}: expert_counts: must be finite and not negative")
        _check_counts(counts.shape[0], counts.shape[1], where)
        with np.errstate(over="ignore"):
            totals = counts.sum(axis=1)
        if ((totals > MAX_LOAD) | ((totals < MIN_LOAD) & (totals > 0))).any():
            raise DocumentError(
                f"{where}: expert_counts: a layer's must sum to 0 or {MIN_LOAD:g}..{MAX_LOAD:.3g} tokens, "
                f"found {totals.min():.3g}..{totals.max():.3g}"
            )
        empty = np.empty((0, counts.shape[0], 0), np.int32)
        return cls(empty, empty.astype(np.float32), np.empty(0, np.int64), counts.shape[1], counts, model, source)

    @classmethod
    def read(cls, path: str | Path) -> "Trace":
        """Read an npz; pickled content is refused, every failure is one line."""
        hint = "; record one with `moeplan trace capture`"
        fields = read_npz(path, MAX_TRACE_BYTES, wanted=_FIELDS, hint=hint)
        where = str(path)
        texts = {name: _text(fields, name, where) for name in ("model", "source")}
        number, zero = _number(fields, "num_experts", where), _number(fields, "zero_experts", where)
        if "expert_ids" not in fields:
            if "expert_counts" not in fields:
                raise DocumentError(f"{where}: holds neither expert_ids nor expert_counts")
            trace = cls.of_counts(fields["expert_counts"], **texts, where=where)
            if number is not None and number != trace.num_experts:
                raise DocumentError(f"{where}: num_experts: expert_counts has {trace.num_experts}, not {number}")
            return trace
        ids = fields.pop("expert_ids")
        if number is None and (ids.dtype.kind not in "iu" or ids.size == 0):
            raise DocumentError(f"{where}: expert_ids: expected integers [tokens, layers, top_k]")
        return cls.of(
            ids,
            number if number is not None else int(ids.max()) + 1,
            zero_experts=zero or 0,
            expert_weights=fields.get("expert_weights"),
            seq_len=fields.get("seq_len"),
            **texts,
            where=where,
        )

    def write(self, path: str | Path) -> Path:
        """Write an npz atomically, in the smallest integer type that holds the expert numbers."""
        extra: dict[str, Any] = {
            "num_experts": np.int64(self.num_experts),
            "model": np.str_(self.model),
            "source": np.str_(self.source),
        }
        if self.counts_only:
            return write_atomically(path, lambda f: np.savez_compressed(f, expert_counts=self.expert_counts, **extra))
        kind = np.min_scalar_type(self.num_experts - 1)
        if self.zero_experts:
            kind, extra["zero_experts"] = np.promote_types(kind, np.int8), np.int64(self.zero_experts)
        return write_atomically(
            path,
            lambda f: np.savez_compressed(
                f,
                expert_ids=self.expert_ids.astype(kind),
                expert_weights=self.expert_weights.astype(np.float16),
                seq_len=self.seq_len.astype(np.int32),
                **extra,
            ),
        )


def _text(fields: dict[str, np.ndarray], name: str, where: str) -> str:
    value = fields.get(name, np.array(""))
    if value.size != 1 or value.dtype.kind != "U" or value.dtype.itemsize > 4 * MAX_TEXT:
        raise DocumentError(f"{where}: {name}: expected one text of at most {MAX_TEXT} characters")
    return str(value.reshape(())[()])


def _number(fields: dict[str, np.ndarray], name: str, where: str) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if value.size != 1 or value.dtype.kind not in "iu":
        raise DocumentError(f"{where}: {name}: expected one integer")
    return int(value.reshape(()))


def _pieces(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive tokens, of about ``_PIECE`` choices each."""
    step = max(1, _PIECE // max(1, ids[:1].size))
    return (ids[first : first + step] for first in range(0, len(ids), step))


def _twice(ids: np.ndarray) -> bool:
    """Whether a token names one expert twice in a layer (-1 names none); ids: [tokens, layers, top_k]."""
    columns = np.ascontiguousarray(ids.reshape(-1, ids.shape[2]).T)
    if len(columns) <= FEW_CHOICES:  # all pairs take less than sorting many short rows
        return any(_same(a, b) for a, b in combinations(columns, 2))
    columns.sort(axis=0)
    return _same(columns[1:], columns[:-1])


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays name one expert in one place."""
    same = a == b
    return bool(same.any() and (same & (a >= 0)).any())


def _counted(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """[layers, experts] choices of each expert, those of none (-1) left out; ids: [tokens, layers, top_k]."""
    counts = np.stack([np.bincount(ids[:, j].ravel() + 1, minlength=num_experts + 1) for j in range(ids.shape[1])])
    return counts[:, 1:].astype(float)


def _check_counts(layers: int, experts: int, where: str) -> None:
    if layers > MAX_LAYERS:
        raise DocumentError(f"{where}: {layers:,} layers, at most {MAX_LAYERS:,} are read")
    if layers * experts > MAX_COUNTS:
        raise DocumentError(f"{where}: {layers:,} layers x {experts:,} experts, at most {MAX_COUNTS:,} are read")

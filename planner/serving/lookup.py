"""Single operators of one GPU type under one engine, looked up in measured tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from ...spec.engines import engine_name
from ...spec.errors import MoeplanError
from ...spec.tabled import System, Table, Tables
from .grid import Grid

if TYPE_CHECKING:
    import pandas as pd

HALF_BYTES = 2
"""Of an activation."""


TABLES = {"tensorrt-llm": "trtllm"}
"""Engines whose tables go by another name than moeplan's."""


@dataclass
class _Kept:
    """What was looked up before: tables, interpolations, and which rows there are."""

    tables: dict[str, Table | None] = field(default_factory=dict)
    grids: dict[tuple[object, ...], Grid] = field(default_factory=dict)
    there: dict[tuple[object, ...], bool] = field(default_factory=dict)


_KEPT: "WeakKeyDictionary[Tables, dict[tuple[str, str, str | None], _Kept]]" = WeakKeyDictionary()


def _kept(tables: Tables, system: str, engine: str, version: str | None) -> _Kept:
    return _KEPT.setdefault(tables, {}).setdefault((system, engine, version), _Kept())


class Lookup:
    """Times of operators in seconds, and what was used for them.

    ``origins``: tables that were used. ``notes``: what stands in for something that no table has, and what lies
    outside the measured sizes.
    """

    def __init__(self, tables: Tables, system: str, engine: str, version: str | None = None) -> None:
        self.engine, self.version = TABLES.get(engine_name(engine), engine), version
        self.tables = tables
        self.system: System = tables.system(system)
        self.origins: dict[str, None] = {}
        self.notes: dict[str, None] = {}
        kept = _kept(tables, system, self.engine, version)
        self._tables, self._grids, self._there = kept.tables, kept.grids, kept.there

    def gemm(self, m: float, n: int, k: int, dtype: str) -> float:
        """[m, k] times [k, n]."""
        return self._ask("gemm", {"dtype": dtype}, ("n", "k", "m"), (n, k, m))

    def moe(self, tokens: float, shape: Mapping[str, int], dtype: str, routing: str) -> float:
        """Routed experts of ``shape`` (hidden, ffn, top_k, experts, tp, ep) on ``tokens`` tokens, router excluded."""
        wanted = {"dtype": dtype, "routing": routing, **shape}
        if not self._has("moe", wanted):
            # Cut into columns or dealt out whole, a rank holds and computes the same share.
            dealt = {**wanted, "tp": 1, "ep": shape["tp"] * shape["ep"]}
            if not self._has("moe", dealt):
                raise self._missing("moe", wanted)
            self.note(f"moe tp {shape['tp']} ep {shape['ep']} of {dtype}: no rows, taken from ep {dealt['ep']}")
            wanted = dealt
        return self._ask("moe", wanted, ("tokens",), (tokens,))

    def prefill_attention(
        self, batch: float, tokens: float, heads: int, kv_heads: int, size: int, **how: object
    ) -> float:
        """Causal attention of ``batch`` prompts of ``tokens`` tokens; ``how``: window, kv_dtype."""
        wanted = self._cached("context_attention", {"head_dim": size, "kv_heads": kv_heads, **how}, heads, kv_heads)
        return self._ask("context_attention", wanted, ("heads", "batch", "new_tokens"), (heads, batch, tokens))

    def decode_attention(
        self, batch: float, context: float, heads: int, kv_heads: int, size: int, **how: object
    ) -> float:
        """One query token of each of ``batch`` sequences against ``context`` tokens."""
        wanted = self._cached("generation_attention", {"head_dim": size, "kv_heads": kv_heads, **how}, heads, kv_heads)
        at = (heads, batch, max(context - 1, 1))
        return self._ask("generation_attention", wanted, ("heads", "batch", "past_tokens"), at)

    def module(self, operator: str, batch: float, length: float, heads: int, **how: object) -> float:
        """A latent attention whole, its projections included: of ``length`` new or past tokens."""
        axis = "new_tokens" if operator.startswith("context") else "past_tokens"
        frame = self._frame(operator)
        wanted = {name: value for name, value in how.items() if name in frame.columns}
        if axis == "new_tokens":
            wanted["past_tokens"] = 0
        for name, otherwise in (("kv_dtype", "bfloat16"), ("gemm_dtype", "bfloat16")):
            if name in wanted and not self._has(operator, wanted):
                self.note(f"{operator}: no rows with {name} {wanted[name]}, taken from {otherwise}")
                wanted[name] = otherwise
        return self._ask(operator, wanted, ("heads", "batch", axis), (heads, batch, length))

    def all_reduce(self, size: float, gpus: int, graph: bool) -> float:
        """``size`` bytes on each of ``gpus`` GPUs of one node; ``graph``: launched from a CUDA graph."""
        if gpus == 1:
            return 0.0
        frame = self._frame("all_reduce")
        ours = sorted(set(frame["kernel"]))
        wanted: dict[str, object] = {"gpus": gpus}
        if len(ours) > 1:
            ending = "graph" if graph else "eager"
            wanted["kernel"] = [name for name in ours if name.endswith(ending)] or ours
        # Above the size at which an engine leaves its own kernel, NCCL may be faster: engines choose by size.
        own = self._ask("all_reduce", wanted, ("bytes",), (size,))
        return min(own, self.nccl("all_reduce", size, gpus))

    def nccl(self, collective: str, size: float, gpus: int) -> float:
        """``size``: bytes of the larger side of a collective."""
        if gpus == 1:
            return 0.0
        table = self._table(NCCL, NCCL)
        dtype = "half" if table is not None and "half" in set(table.frame["dtype"]) else "bfloat16"
        return self._ask("nccl", {"collective": collective, "gpus": gpus, "dtype": dtype}, ("bytes",), (size,))

    def batched(self, part: str, tokens: float, heads: int, how: Mapping[str, object]) -> float:
        """One of the two products by head of latent attention when it decodes: ``mla_gen_pre`` or ``mla_gen_post``."""
        return self._ask("mla_bmm", {"part": part, **how}, ("heads", "tokens"), (heads, tokens))

    def host_call(self) -> float:
        """Seconds that the host takes to launch one operator outside of a CUDA graph.

        Measured: what the smallest all-reduce takes longer when it is not launched from a graph.
        """
        frame = self._frame("all_reduce")
        small = frame[frame["bytes"] == frame["bytes"].min()]
        eager, graph = (small.loc[small["kernel"].str.endswith(end), "seconds"] for end in ("eager", "graph"))
        if eager.empty or graph.empty:
            return HOST_SECONDS
        return max(float(eager.median() - graph.median()), 0.0)

    def gated_delta(self, phase: str, batch: float, length: float, heads: int, hidden: int) -> float:
        """Convolution and recurrence of a gated delta net with ``heads`` value heads on this rank."""
        total = 0.0
        frame = self._frame("gated_delta")
        for kernel in sorted(set(frame.loc[frame["phase"] == phase, "kernel"])):
            wanted = {"phase": phase, "kernel": [kernel], "num_v_heads": heads, "d_model": hidden}
            axes, at = (("batch", "new_tokens"), (batch, length)) if phase == "context" else (("batch",), (batch,))
            total += self._ask("gated_delta", wanted, axes, at)
        return total

    def streamed(self, size: float) -> float:
        """A kernel that only moves ``size`` bytes to and from memory, at the rate that copies reach."""
        return LAUNCH_SECONDS + size / (self.system.memory_bytes_per_second * COPY_SHARE)

    def kernels(self, operator: str, without: str) -> list[str]:
        """Names of the kernels of an operator that do not have ``without`` in them."""
        return sorted(name for name in set(self._frame(operator)["kernel"]) if without not in name)

    def has(self, operator: str, wanted: Mapping[str, object]) -> bool:
        """Whether a table of this operator has such rows."""
        return self._has(operator, wanted)

    def _cached(self, operator: str, wanted: Mapping[str, object], heads: int, kv_heads: int) -> dict[str, object]:
        """``wanted`` with what the table has: attention over all tokens or in bf16 where the asked kind was not run."""
        found = dict(wanted)
        if kv_heads == heads and not self._has(operator, found):
            found.pop("kv_heads")
        for name, otherwise in (("kv_dtype", "bfloat16"), ("window", 0)):
            if name in found and found[name] != otherwise and not self._has(operator, found):
                self.note(f"{operator}: no rows with {name} {found[name]}, taken from {otherwise}")
                found[name] = otherwise
        return found

    def _ask(self, operator: str, wanted: Mapping[str, object], axes: Sequence[str], at: Sequence[float]) -> float:
        self._table(operator, NCCL if operator == NCCL else self.engine)  # noted as used
        key = (operator, tuple((name, str(value)) for name, value in wanted.items()))
        grid = self._grids.get(key)
        if grid is None:
            frame = self._rows(operator, wanted)
            if frame is None or frame.empty:
                raise self._missing(operator, wanted)
            sizes = [np.asarray(frame[axis], dtype=float) for axis in axes]
            grid = self._grids[key] = Grid(sizes, np.asarray(frame["seconds"], dtype=float))
        seconds = grid(*at)
        if grid.outside:
            self.note(f"{operator}: asked outside the measured sizes of {', '.join(axes)}")
        return seconds

    def _rows(self, operator: str, wanted: Mapping[str, object]) -> "pd.DataFrame | None":
        table = self._table(operator, NCCL if operator == NCCL else self.engine)
        if table is None:
            return None
        frame = table.frame
        chosen = np.ones(len(frame), dtype=bool)
        for name, value in wanted.items():
            if name in frame.columns:
                column = frame[name]
                chosen &= np.asarray(column.isin(value) if isinstance(value, list) else column == value)
        return frame[chosen]

    def _has(self, operator: str, wanted: Mapping[str, object]) -> bool:
        key = (operator, tuple((name, str(value)) for name, value in wanted.items()))
        if key not in self._there:
            rows = self._rows(operator, wanted)
            self._there[key] = rows is not None and not rows.empty
        return self._there[key]

    def _frame(self, operator: str) -> "pd.DataFrame":
        table = self._table(operator, self.engine)
        if table is None:
            raise self._missing(operator, {})
        return table.frame

    def _table(self, operator: str, engine: str) -> Table | None:
        if operator not in self._tables:
            try:
                self._tables[operator] = self.tables.table(operator, self.system.name, engine, self.version)
            except MoeplanError:
                self._tables[operator] = None
        table = self._tables[operator]
        if table is not None:
            self.origins[f"{operator}: {engine} {table.version}, {table.origin.kind}"] = None
        return table

    def note(self, text: str) -> None:
        """Something that the reader of a prediction should know."""
        self.notes[text] = None

    def _missing(self, operator: str, wanted: Mapping[str, object]) -> MoeplanError:
        said = ", ".join(f"{name} {value}" for name, value in wanted.items())
        return MoeplanError(
            f"{self.system.name} with {self.engine}: no measured rows of {operator} with {said or 'anything'}; "
            "choose another engine, precision or degree"
        )


NCCL = "nccl"
LAUNCH_SECONDS = 3e-6
"""Of a kernel that moves next to nothing: what the data sheets that come with the tables say."""
HOST_SECONDS = 2e-5
"""What ``host_call`` is for engines whose all-reduce was measured in one way only: as of the others."""
COPY_SHARE = 0.8
"""Of a data sheet's memory rate, what a copy reaches."""

"""What a row must take at least: its arithmetic, its memory traffic and its transfers at the data sheet's rates.

    least = max(FLOP / (FLOP/s), bytes of memory / (bytes/s), bytes sent / (bytes/s of the link))

(Williams, Waterman and Patterson, "Roofline", 2009.) Counts are those that no implementation can avoid: every weight
and cache entry that is used is read once, every input is read and every output written once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...spec.tabled import NUMBERS, System

if TYPE_CHECKING:
    import pandas as pd

# The largest last-level cache of a GPU with tables is 128 MiB: that much may be there from the call before.
CACHE_BYTES = 128 * 2**20
# DeepSeek's latent attention: dimensions of a query's parts, of a value, and of the latent that is cached.
_NOPE, _ROPE, _VALUE, _LATENT = 128, 64, 128, 512


@dataclass(frozen=True)
class Work:
    """Of every row: FLOP, bytes of memory read and written, bytes that one GPU sends to others."""

    flops: np.ndarray
    memory: np.ndarray
    sent: np.ndarray


def count_work(frame: "pd.DataFrame", operator: str) -> Work:
    """The work of every row. KeyError for an operator that is not counted: ask ``COUNTED``."""
    zeros = np.zeros(len(frame))
    flops, memory, sent = COUNTED[operator](frame)
    return Work(zeros + flops, zeros + memory, zeros + sent)


def least_seconds(frame: "pd.DataFrame", operator: str, system: System, cached: float = 0.0) -> np.ndarray:
    """The least time of every row, in seconds; ``cached``: bytes that need not come from memory.

    NaN where the data sheet has no rate for the row's type of numbers.
    """
    work = count_work(frame, operator)
    rates = _rates(frame["dtype"], system)
    if "kv_dtype" in frame:  # keys in fp8 may be multiplied as fp8 or as bfloat16: the faster of them is the least
        rates = np.fmax(rates, _rates(frame["kv_dtype"], system))
    compute = np.where(work.flops > 0, work.flops / rates, 0.0)
    memory = np.maximum(work.memory - cached, 0.0) / system.memory_bytes_per_second
    transfer = work.sent / link_rates(frame, system) if work.sent.any() else 0.0
    return np.maximum(np.maximum(compute, memory), transfer)


def link_rates(frame: "pd.DataFrame", system: System) -> np.ndarray:
    """Bytes per second of the slowest link that the GPUs of a row need, for one GPU and direction."""
    gpus = frame["gpus"].to_numpy()
    rack = system.gpus_per_rack or np.inf
    beyond = system.inter_rack_bytes_per_second or system.inter_node_bytes_per_second
    outside = np.where(gpus > rack, beyond, system.inter_node_bytes_per_second)
    return np.where(gpus > system.gpus_per_node, outside, system.intra_node_bytes_per_second)


def _rates(names: "pd.Series", system: System) -> np.ndarray:
    known = {name: system.flops.get(NUMBERS[name][2], np.nan) for name in names.unique()}
    return names.map(known).to_numpy(dtype=float)


def _widths(names: "pd.Series", which: int) -> np.ndarray:
    known = {name: NUMBERS[name][which] for name in names.unique()}
    return names.map(known).to_numpy(dtype=float)


Counts = tuple[np.ndarray, np.ndarray, np.ndarray | float]


def _gemm(f: "pd.DataFrame") -> Counts:
    m, n, k = (f[name].to_numpy(dtype=float) for name in ("m", "n", "k"))
    weights, inputs = _widths(f["dtype"], 0), _widths(f["dtype"], 1)
    return 2 * m * n * k, n * k * weights + m * k * inputs + 2 * m * n, 0.0


def _moe(f: "pd.DataFrame") -> Counts:
    """Experts of two matrices: those of three take more. ``tokens`` are those of all ranks of the expert parallelism.

    The rank that was timed is not named: with uneven routing over several ranks nothing can be said of its share.
    """
    tokens, hidden, ffn, top_k, experts, tp, ep = (
        f[name].to_numpy(dtype=float) for name in ("tokens", "hidden", "ffn", "top_k", "experts", "tp", "ep")
    )
    even = f["routing"].isin(["balanced", "uniform"]).to_numpy()
    rows = np.where(even | (ep == 1), tokens * top_k / ep, 0.0)
    used = np.where(even, np.minimum(experts / ep, rows), np.where(ep == 1, np.minimum(top_k, experts), 0.0))
    expert = 2 * hidden * ffn / tp
    return 2 * rows * expert, used * expert * _widths(f["dtype"], 0), 0.0


def _attended(f: "pd.DataFrame", causal: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every row: pairs of query and key, new tokens, and tokens whose keys are read."""
    batch, new = f["batch"].to_numpy(dtype=float), f["new_tokens"].to_numpy(dtype=float)
    past = f["past_tokens"].to_numpy(dtype=float) if "past_tokens" in f else np.zeros(len(f))
    seen = past + (new + 1) / 2 if causal else new
    read = past + new
    if "window" in f:
        window = f["window"].to_numpy(dtype=float)
        # With a window the first queries see fewer: half of it is less than any average.
        seen = np.where(window > 0, np.minimum(seen, window / 2), seen)
        read = np.where(window > 0, np.minimum(read, np.maximum(window, new)), read)
    return batch * new * seen, batch * new, batch * read


def _attention(f: "pd.DataFrame", causal: bool = True) -> Counts:
    pairs, new, read = _attended(f, causal)
    heads, size = f["heads"].to_numpy(dtype=float), f["head_dim"].to_numpy(dtype=float)
    kept = (f["kv_heads"] if "kv_heads" in f else f["heads"]).to_numpy(dtype=float)
    width = _widths(f["kv_dtype"] if "kv_dtype" in f else f["dtype"], 1)
    return 4 * pairs * heads * size, 2 * size * (kept * read * width + 2 * heads * new), 0.0


def _context_mla(f: "pd.DataFrame") -> Counts:
    pairs, new, _ = _attended(f)
    heads = f["heads"].to_numpy(dtype=float)
    query = _NOPE + _ROPE
    return 2 * pairs * heads * (query + _VALUE), 2 * new * heads * (query + _VALUE), 0.0


def _generation_mla(f: "pd.DataFrame") -> Counts:
    pairs, _, read = _attended(f)
    heads = f["heads"].to_numpy(dtype=float)
    kept = (_LATENT + _ROPE) * read * _widths(f["kv_dtype"], 1)
    return 2 * pairs * heads * (2 * _LATENT + _ROPE), kept, 0.0


def _mla_bmm(f: "pd.DataFrame") -> Counts:
    tokens, heads = f["tokens"].to_numpy(dtype=float), f["heads"].to_numpy(dtype=float)
    matrix = heads * _NOPE * _LATENT
    return 2 * tokens * matrix, matrix * _widths(f["dtype"], 0), 0.0


def _collective(f: "pd.DataFrame") -> Counts:
    """``bytes`` is the whole buffer: every GPU sends at least the shares of the others, also with reduction in the
    network."""
    gpus, size = f["gpus"].to_numpy(dtype=float), f["bytes"].to_numpy(dtype=float)
    return np.zeros(len(f)), 2 * size, size * (gpus - 1) / gpus


COUNTED: dict[str, Callable[["pd.DataFrame"], Counts]] = {
    "gemm": _gemm,
    "moe": _moe,
    "moe_wideep": _moe,
    "context_attention": _attention,
    "generation_attention": _attention,
    "encoder_attention": lambda f: _attention(f, causal=False),
    "context_mla": _context_mla,
    "generation_mla": _generation_mla,
    "mla_bmm": _mla_bmm,
    "all_reduce": _collective,
    "nccl": _collective,
    "oneccl": _collective,
}

"""How the engines of the measured rows were started: what the launch scripts of InferenceX say (Apache-2.0).

https://github.com/SemiAnalysisAI/InferenceX, benchmarks/single_node, as they stood when the rows were measured
(February to April 2026), and its client: lengths between 80 and 100 % of the nominal, ten requests of each client, no
limit on the rate.
"""

from dataclasses import replace
from typing import NamedTuple

from moeplan.planner.serving import Degrees, Load, Settings, defaults

SHORTEST = 0.8


class Row(NamedTuple):
    """One measured configuration."""

    system: str
    backend: str
    backend_version: str
    family: str
    precision: str
    isl: int
    osl: int
    conc: int
    tp_size: int
    pp_size: int
    attention_dp_size: int
    moe_tp_size: int
    moe_ep_size: int

    @property
    def hopper(self) -> bool:
        return self.system.startswith("h")


def load(row: Row) -> Load:
    """Of four rounds where ten would be thousands of requests: the first, all at once, then weighs more."""
    return Load(row.isl, row.osl, row.conc, SHORTEST, rounds=10)


def degrees(row: Row) -> Degrees:
    """As the row says, but for vLLM with attention dp: started with tp 1, and its GPUs counted twice.

    InferenceX turns "tp: 2, ep: 2, dp-attn: true" into ``--tensor-parallel-size=1 --data-parallel-size=2``; the row
    says tp 2, dp 2 and ep 4. Requests of 512 clients queue for the memory of two GPUs, not of four.
    """
    dp = max(row.attention_dp_size, 1)
    if row.backend == "vllm" and dp > 1 and row.tp_size == dp:
        return Degrees(1, row.pp_size, dp, row.moe_tp_size, row.moe_ep_size // dp)
    return Degrees(row.tp_size, row.pp_size, dp, row.moe_tp_size, row.moe_ep_size)


def settings(row: Row) -> Settings:
    """Of the launch script of this row's model, engine and GPU."""
    return {"vllm": _vllm, "sglang": _sglang, "trtllm": _trtllm}[row.backend](row, defaults(row.backend))


def _vllm(row: Row, plain: Settings) -> Settings:
    if row.family == "gptoss":
        cache = "bfloat16" if row.hopper else "fp8"
        return replace(plain, graph_tokens=2048, kv_cache=cache, max_requests=row.conc if row.hopper else 1024)
    if row.family == "kimi":
        early = row.backend_version < "0.18"
        if row.precision == "int4":
            return replace(plain, max_requests=row.conc, memory_share=0.95 if row.hopper else 0.9)
        chunk, graph = (8192, 512) if early else (2 * row.isl, 2048)
        return replace(plain, chunk=chunk, graph_tokens=graph, kv_cache="fp8", max_requests=row.conc)
    if row.hopper:
        return replace(plain, memory_share=0.95 if row.system == "h200_sxm" else 0.9)
    if row.backend_version < "0.18":
        return replace(plain, kv_cache="fp8")
    return replace(plain, chunk=2 * row.isl, graph_tokens=2048, kv_cache="fp8")


def _sglang(row: Row, plain: Settings) -> Settings:
    if row.family == "qwen35":
        if row.hopper:
            return replace(plain, chunk=16384, kv_cache="fp8", max_requests=128, memory_share=0.8)
        interval = 10 if row.system == "b300_sxm" and row.precision == "fp8" else 30 if row.conc >= 16 else 10
        cache = "bfloat16" if row.precision == "bf16" else "fp8"
        return replace(plain, chunk=32768, kv_cache=cache, recv_interval=interval, max_requests=128, memory_share=0.82)
    if row.hopper:
        return replace(plain, memory_share=0.85)
    interval = 10 if row.precision == "fp4" else 1
    return replace(plain, chunk=32768, kv_cache="fp8", recv_interval=interval, memory_share=0.85)


def _trtllm(row: Row, plain: Settings) -> Settings:
    """On Blackwell gpt-oss runs with activations in mxfp8 (moe backend TRTLLM), on Hopper with Triton's kernels."""
    if row.family == "gptoss":
        experts = None if row.hopper else "w4a8_mxfp4_mxfp8"
        cache = "bfloat16" if row.hopper else "fp8"
        return replace(plain, chunk=20000, kv_cache=cache, moe=experts, memory_share=0.85)
    return replace(plain, chunk=max(row.conc + row.isl + 64, 8192), kv_cache="fp8", memory_share=0.8)

"""The commands that start a ServingPlan: flags and files of its engine, checked against the degrees of the plan.

Flags are those of the versions that ``planner.export`` names; only flags in ``FLAGS`` are written, so that one which an
engine does not know is a fault here. Every number that the plan counts with is said, defaults too: they differ between
versions.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...spec.serving import Replicas, ServingPlan
from .engines import FACTS, MEMORY_FRACTION

MASTER = "HOST:PORT"  # of the first host, which only the user knows
FLAGS: dict[str, tuple[str, ...]] = {
    "vllm": (
        "--tensor-parallel-size",
        "--pipeline-parallel-size",
        "--data-parallel-size",
        "--enable-expert-parallel",
        "--gpu-memory-utilization",
        "--max-num-seqs",
        "--max-num-batched-tokens",
        "--max-model-len",
        "--nnodes",
        "--node-rank",
        "--master-addr",
        "--kv-transfer-config",
    ),
    "sglang": (
        "--model-path",
        "--tp-size",
        "--pp-size",
        "--attn-dp-size",
        "--ep-size",
        "--mem-fraction-static",
        "--chunked-prefill-size",
        "--max-running-requests",
        "--context-length",
        "--nnodes",
        "--node-rank",
        "--dist-init-addr",
        "--disaggregation-mode",
    ),
    "tensorrt-llm": (
        "--tp_size",
        "--pp_size",
        "--ep_size",
        "--max_batch_size",
        "--max_num_tokens",
        "--max_seq_len",
        "--kv_cache_free_gpu_memory_fraction",
        "--extra_llm_api_options",
    ),
}


@dataclass(frozen=True)
class Start:
    """How each of ``count`` replicas starts: on ``hosts`` hosts, what the environment holds, the command, its files."""

    count: int
    what: str
    hosts: int
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def starts(plan: ServingPlan, model: str) -> list[Start]:
    """One for each form of replica. ``model``: what the engine is given, a name or a path."""
    return [_WRITERS[plan.engine](plan, replicas, i, model) for i, replicas in enumerate(plan.replicas)]


def _hosts(replicas: Replicas) -> int:
    """Hosts that one replica lies on: those of each stage on equal hosts; small stages of one kind share one."""
    by_kind: dict[tuple[str, int], int] = {}
    for stage in replicas.stages:
        key = stage.kind, stage.per_host
        by_kind[key] = by_kind.get(key, 0) + stage.gpus
    return sum(math.ceil(gpus / per_host) for (_, per_host), gpus in by_kind.items())


def _what(replicas: Replicas) -> str:
    """One printable line: it becomes a comment of a script, and kinds are named by a file."""
    on = " | ".join(f"{stage.gpus} x {stage.kind}, {stage.layers} layers" for stage in replicas.stages)
    on = "".join(c if c.isprintable() else "?" for c in on)
    return on if replicas.role == "both" else f"{replicas.role} worker, {on}"


def _length(plan: ServingPlan) -> int:
    return plan.load.most_tokens


def _partition(replicas: Replicas) -> str:
    return ",".join(str(stage.layers) for stage in replicas.stages)


def _common_notes(plan: ServingPlan, replicas: Replicas, hosts: int) -> list[str]:
    notes = []
    if hosts > 1:
        notes.append(f"start it on each of its {hosts} hosts with its own rank of the node, the same {MASTER}")
    if len({stage.kind for stage in replicas.stages}) > 1:
        notes.append("stages stand on different GPUs: give the engine the devices in this order")
    if replicas.share < 0.995:
        them = f"these {replicas.count} replicas" if replicas.count > 1 else "this replica"
        notes.append(f"the router sends {replicas.share:.0%} of the requests to {them}")
    return notes


def _vllm(plan: ServingPlan, replicas: Replicas, number: int, model: str) -> Start:
    d, hosts = replicas.degrees, _hosts(replicas)
    command = ["vllm", "serve", model, "--tensor-parallel-size", str(d.tp)]
    if d.pp > 1:
        command += ["--pipeline-parallel-size", str(d.pp)]
    if d.dp > 1:
        command += ["--data-parallel-size", str(d.dp)]
    if d.moe_ep > 1:
        command += ["--enable-expert-parallel"]
    command += ["--gpu-memory-utilization", str(MEMORY_FRACTION)]
    command += ["--max-num-seqs", str(-(-replicas.concurrency // d.dp))]
    command += ["--max-num-batched-tokens", str(FACTS["vllm"].step_tokens), "--max-model-len", str(_length(plan))]
    notes = _common_notes(plan, replicas, hosts)
    if hosts > 1:
        command += ["--nnodes", str(hosts), "--node-rank", "0", "--master-addr", MASTER]
    if replicas.role != "both":
        config = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
        command += ["--kv-transfer-config", json.dumps(config, separators=(",", ":"))]
        notes.append("a proxy sends every prompt to a prefill worker first; vLLM has one among its examples")
    environment = {"VLLM_PP_LAYER_PARTITION": _partition(replicas)} if d.pp > 1 else {}
    return Start(replicas.count, _what(replicas), hosts, _checked("vllm", command), environment, {}, tuple(notes))


def _sglang(plan: ServingPlan, replicas: Replicas, number: int, model: str) -> Start:
    d, hosts = replicas.degrees, _hosts(replicas)
    command = ["python", "-m", "sglang.launch_server", "--model-path", model, "--tp-size", str(d.tp * d.dp)]
    if d.pp > 1:
        command += ["--pp-size", str(d.pp)]
    if d.dp > 1:
        command += ["--attn-dp-size", str(d.dp)]
    if d.moe_ep > 1:
        command += ["--ep-size", str(d.moe_ep)]
    # Buffers and graphs are outside of SGLang's static part.
    static = min(
        MEMORY_FRACTION * (1 - (s.memory.activations + s.memory.overhead) / s.memory.limit) for s in replicas.stages
    )
    command += ["--mem-fraction-static", f"{math.floor(static * 1000) / 1000:g}"]
    command += ["--chunked-prefill-size", str(FACTS["sglang"].step_tokens)]
    command += ["--max-running-requests", str(replicas.concurrency), "--context-length", str(_length(plan))]
    notes = _common_notes(plan, replicas, hosts)
    if hosts > 1:
        command += ["--nnodes", str(hosts), "--node-rank", "0", "--dist-init-addr", MASTER]
    if replicas.role != "both":
        command += ["--disaggregation-mode", replicas.role]
        notes.append("SGLang's router takes the addresses of both kinds of workers")
    environment = {"SGLANG_PP_LAYER_PARTITION": _partition(replicas)} if d.pp > 1 else {}
    return Start(replicas.count, _what(replicas), hosts, _checked("sglang", command), environment, {}, tuple(notes))


def _tensorrt_llm(plan: ServingPlan, replicas: Replicas, number: int, model: str) -> Start:
    d, hosts = replicas.degrees, _hosts(replicas)
    name = f"extra_llm_api_options_{number}.yaml"
    command = ["trtllm-serve", model, "--tp_size", str(d.tp * d.dp)]
    if d.pp > 1:
        command += ["--pp_size", str(d.pp)]
    if d.moe_ep > 1:
        command += ["--ep_size", str(d.moe_ep)]
    command += ["--max_batch_size", str(-(-replicas.concurrency // d.dp))]
    command += ["--max_num_tokens", str(FACTS["tensorrt-llm"].step_tokens), "--max_seq_len", str(_length(plan))]
    # A part of what is free once weights and buffers are there.
    parts = []
    for stage in replicas.stages:
        m = stage.memory
        used = m.weights + m.activations + m.overhead
        parts.append((m.limit - used) / (m.limit / MEMORY_FRACTION - used))
    command += ["--kv_cache_free_gpu_memory_fraction", f"{math.floor(min(parts) * 1000) / 1000:g}"]
    command += ["--extra_llm_api_options", name]
    lines = [f"enable_attention_dp: {'true' if d.dp > 1 else 'false'}"]
    lines += [f"pp_partition: [{_partition(replicas)}]"] if d.pp > 1 else []
    notes = _common_notes(plan, replicas, hosts)
    if hosts > 1:
        notes.append("TensorRT-LLM spans hosts by MPI: start it under `mpirun` or `srun` with one rank per GPU")
    if replicas.role != "both":
        lines += ["cache_transceiver_config:", "  backend: DEFAULT"]
        notes.append("`trtllm-serve disaggregated` takes the addresses of context and generation servers")
    files = {name: "\n".join(lines) + "\n"}
    command_ = _checked("tensorrt-llm", command)
    return Start(replicas.count, _what(replicas), hosts, command_, {}, files, tuple(notes))


def _checked(engine: str, command: Sequence[str]) -> tuple[str, ...]:
    """The command; AssertionError where it holds a flag that this engine's table lacks."""
    unknown = [word for word in command if word.startswith("--") and word not in FLAGS[engine]]
    if unknown:
        raise AssertionError(f"{engine} has no {unknown[0]}")
    return tuple(command)


_WRITERS: dict[str, Callable[[ServingPlan, Replicas, int, str], Start]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "tensorrt-llm": _tensorrt_llm,
}

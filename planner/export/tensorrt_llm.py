"""TensorRT-LLM: ``moe_load_balancer.yaml``, named by ``moe_config.load_balancer`` of the options file.

    num_slots: 6
    initial_global_assignments:
      3: [0, 1, 2, 3, 0, 1]
    layer_updates_per_iter: 0

Keys are layer indices of the model (integers); every layer with experts is there; exactly these three fields. With
multi-token prediction on, its layers are asked for too: their keys follow the model's last layer.
Source: llmapi/llm_args.py, MoeLoadBalancerConfig.get_layer_initial_global_assignments.
"""

import json

from pydantic import ConfigDict, Field

from ...spec.document import Part, show
from ...spec.errors import DocumentError
from ...spec.placement import Placement
from ...spec.texts import parse_yaml
from .common import (
    MULTI_TOKEN,
    Engine,
    Export,
    PathOf,
    Slots,
    Target,
    check_length,
    check_row,
    parse_as,
    rows_of,
    slots_of,
)

FILE = "moe_load_balancer.yaml"
OPTIONS = "extra_llm_api_options.yaml"


class _Balancer(Part):
    num_slots: int
    initial_global_assignments: dict[int, list[int]]
    layer_updates_per_iter: int


class _MoeConfig(Part):
    model_config = ConfigDict(extra="ignore")  # the user's own options may stand beside ours

    load_balancer: str = Field(min_length=1)


class _Options(Part):
    model_config = ConfigDict(extra="ignore")

    enable_attention_dp: bool
    moe_config: _MoeConfig


def write(placement: Placement, target: Target, path_of: PathOf) -> Export:
    rows = rows_of(placement)
    lines = [f"num_slots: {len(rows[0])}", "initial_global_assignments:"]
    lines += [f"  {index}: {row}" for index, row in zip(target.moe_layers, rows, strict=True)]
    extra = target.model.family in MULTI_TOKEN
    if extra:
        lines += [f"  {target.hidden_layers}: {[slot % target.experts for slot in range(len(rows[0]))]}"]
    lines += ["layer_updates_per_iter: 0"]
    # A JSON string is a YAML string, whatever the path holds.
    options = ["enable_attention_dp: true", "moe_config:", f"  load_balancer: {json.dumps(path_of(FILE))}"]
    files = {FILE: "\n".join(lines) + "\n", OPTIONS: "\n".join(options) + "\n"}
    ranks = str(target.ranks)
    command = ["--tp_size", ranks, "--ep_size", ranks, "--extra_llm_api_options", path_of(OPTIONS)]
    notes = [
        "TensorRT-LLM silently ignores the placement unless expert parallelism and attention data parallelism are "
        f"on: {OPTIONS} turns the latter on; merge it with your own options",
        "layer_updates_per_iter 0 keeps the placement fixed while it serves",
    ]
    if extra:
        notes.append(
            f"key {target.hidden_layers} is the multi-token-prediction layer's, experts in order: TensorRT-LLM asks "
            "for it if the prediction is on, and does not read it otherwise"
        )
    return Export(ENGINE.name, ENGINE.version, files, command, notes, beside=(OPTIONS,))


def read(text: str, where: str, target: Target) -> Slots | None:
    body = parse_yaml(text, where)
    if isinstance(body, dict) and "moe_config" in body:
        if not parse_as(_Options, body, where).enable_attention_dp:
            raise DocumentError(f"{where}: enable_attention_dp: false, but the placement is used only where it is true")
        return None
    balancer = parse_as(_Balancer, body, where)
    if balancer.layer_updates_per_iter:
        raise DocumentError(
            f"{where}: layer_updates_per_iter: {balancer.layer_updates_per_iter}, expected 0 (a fixed placement)"
        )
    rows = balancer.initial_global_assignments
    if set(rows) - _prediction_layers(rows, target) != set(target.moe_layers):
        wrong = min((set(rows) - _prediction_layers(rows, target)) ^ set(target.moe_layers))
        state = "missing" if wrong in target.moe_layers else f"no layer of {target.model.name!r} with experts"
        raise DocumentError(f"{where}: initial_global_assignments: layer {show(wrong)}: {state}")
    for index, row in rows.items():
        check_length(row, balancer.num_slots, f"{where}: initial_global_assignments[{index}]")
        check_row(row, target, f"{where}: initial_global_assignments[{index}]")
    return slots_of([rows[index] for index in target.moe_layers], target.ranks)


def _prediction_layers(rows: dict[int, list[int]], target: Target) -> set[int]:
    """Keys of multi-token-prediction layers: those that follow the last layer without a gap, where a family has any."""
    found = target.hidden_layers
    while target.model.family in MULTI_TOKEN and found in rows:
        found += 1
    return set(range(target.hidden_layers, found))


ENGINE = Engine("tensorrt-llm", "TensorRT-LLM", "1.2.1", (FILE,), write, read, beside=(OPTIONS,))

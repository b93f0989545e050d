"""Malformed files of every engine are refused with a reason: by hand, by mutation, and hostile ones."""

import json
import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.export import ENGINES, export, validate
from moeplan.spec.errors import DocumentError
from moeplan.tests.exports import linear_placement, small_model

MALFORMED = [
    ("sglang", '{"physical_to_logical_map": [[0,1,2,3]]}', "physical_to_logical_map: 1 rows, expected 2"),
    ("sglang", '{"physical_to_logical_map": [[0,1,2,3],[0,1,2,4]]}', r"\[1\]\[3\]: expert 4, expected 0..3"),
    ("sglang", '{"physical_to_logical_map": [[0,1,2,2],[0,1,2,3]]}', r"\[0\]: every expert needs a slot.* first 3"),
    ("sglang", '{"physical_to_logical_map": [[0,1,2,3,0],[0,1,2,3,0]]}', r"5 slots do not divide between 2 ranks"),
    ("sglang", '{"physical_to_logical_map": [[0,1,2,3],[0,1,2,3,0,1]]}', r"\[1\]: 6 slots, expected 4"),
    ("sglang", '{"physical_to_logical_map": [[0,1,2,3],[0,1,2,true]]}', r"map\[1\]\[3\].*integer.*True"),
    ("sglang", '{"physical_to_logical_map": [[0,1,2,3],[0,1,2,3]], "ep_size": 2}', "ep_size: Extra"),
    ("sglang", '{"physical_to_logical_map": [[0,1,2,3]', "JSON"),
    ("sglang", "[]", "object"),
    ("tensorrt-llm", "num_slots: 4\nlayer_updates_per_iter: 0\n", "initial_global_assignments: Field required"),
    (
        "tensorrt-llm",
        "num_slots: 4\ninitial_global_assignments: {0: [0, 1, 2, 3]}\nlayer_updates_per_iter: 0",
        "layer 0",
    ),
    ("tensorrt-llm", "num_slots: 4\ninitial_global_assignments: {'1': [0, 1, 2, 3]}\nlayer_updates_per_iter: 0", "'1'"),
    (
        "tensorrt-llm",
        "num_slots: 6\ninitial_global_assignments: {1: [0, 1, 2, 3]}\nlayer_updates_per_iter: 0",
        "4 slots",
    ),
    ("tensorrt-llm", "num_slots: 4\ninitial_global_assignments: {1: [0, 1, 2, 3]}\nlayer_updates_per_iter: 2", "fixed"),
    ("tensorrt-llm", "num_slots: [", "not YAML"),
    ("tensorrt-llm", "num_slots: !!int ''", "not YAML"),
    ("tensorrt-llm", "enable_attention_dp: false\nmoe_config: {load_balancer: x.yaml}", "enable_attention_dp: false"),
    ("vllm-ascend", "MAP|device_count|3", "device_count: 3 devices, expected 2"),
    ("vllm-ascend", "MAP|layer_id|1", "layer_id: 1, expected 0"),
    ("vllm-ascend", "MAP|device_expert|[0, 0]", "twice"),
    ("vllm-ascend", "MAP|device_expert|[0]", "slots, expected"),
    ("vllm-ascend", "MAP|device_id|7", "device_id: 7"),
    ("vllm-ascend", '{"moe_layer_count": 3, "layer_list": []}', "moe_layer_count: 3"),
    ("vllm", '{"expert_to_ep_rank": [0, 0, 0, 1]}', "unequal"),
    ("vllm", '{"expert_to_ep_rank": [0, 0, 2, 1]}', r"\[2\]: rank 2"),
    ("vllm", '{"expert_to_ep_rank": [0, 1]}', "2 entries"),
    ("vllm", "[[0, 1, 2, 3], [0, 1, 2, 3]]", "2 rows"),
    ("vllm", "[]", "every expert"),
    ("vllm", "[1, [2]]", "integer"),
    ("vllm", '{"record_type": "eplb_load_stats"}', "record_type"),
    ("vllm", "--enable-expert-parallel\n--tensor-parallel-size\n3", "--tensor-parallel-size: '3', expected 2"),
    ("vllm", "--tensor-parallel-size\n2", "--enable-expert-parallel is missing"),
    ("vllm", "--enable-expert-parallel\n--tensor-parallel-size\n2\n--enable-eplb\n--eplb-config\n{}", "required"),
    ("vllm", "--enable-expert-parallel\n--tensor-parallel-size\n2\n--expert-placement-strategy\nmine", "'mine'"),
    ("vllm", "--fast", "'--fast'"),
    ("vllm", "", "JSON"),
    ("megatron", '{"kind": "moeplan.plan"}', "kind"),
    ("megatron", "PERMUTATION|layers|{'1': [0, 1, 2, 2]}", "every expert"),
    ("megatron", "PERMUTATION|layers|{'1': [0, 1, 2, 3, 0, 1]}", "6 positions"),
    ("megatron", "PERMUTATION|layers|{'0': [0, 1, 2, 3]}", "layer '0'"),
    ("megatron", "PERMUTATION|num_experts|8", "num_experts: 8, expected 4"),
    ("megatron", "PERMUTATION|expert_model_parallel_size|4", "expert_model_parallel_size: 4, expected 2"),
    ("megatron", "--expert-model-parallel-size\n2", "missing"),
    ("megatron", "--expert-model-parallel-size\n2\n--seed", "3 lines"),
    (
        "deepspeed",
        '{"expert_parallel": {"enabled": true, "autoep_size": 3, "preset_model": "qwen3_moe"}}',
        "autoep_size: 3",
    ),
    ("deepspeed", '{"expert_parallel": {"enabled": true, "autoep_size": 2, "preset_model": "olmoe"}}', "'olmoe'"),
    (
        "deepspeed",
        '{"expert_parallel": {"enabled": false, "autoep_size": 2, "preset_model": "qwen3_moe"}}',
        "enabled: false",
    ),
    ("deepspeed", "{}", "expert_parallel: Field required"),
]


@pytest.mark.parametrize(("engine", "text", "problem"), MALFORMED)
def test_malformed_files_are_refused_in_words(engine: str, text: str, problem: str) -> None:
    model = small_model(4, 1, dense=1)
    if text.startswith(("MAP|", "PERMUTATION|")):
        _, field, value = text.split("|")
        name = "vllm-ascend-expert-map.json" if engine == "vllm-ascend" else "expert-permutation.json"
        body = export(linear_placement(model, 2), engine, model).files[name]
        text = re.sub(
            rf'"{field}":\s*(\{{[^}}]*\}}|\[[^\]]*\]|\d+)', f'"{field}": {value}'.replace("'", '"'), body, count=1
        )
        assert text != body
    with pytest.raises(DocumentError, match=problem) as refused:
        validate(engine, text, model, 2)
    assert str(refused.value).startswith(f"{engine}: ")
    assert "\n" not in str(refused.value)


JUNK = st.sampled_from(
    [None, True, -1, 0, 1, 7, 10**30, 1.5, float("nan"), "", "x", "\ud800", [], {}, [[]], {"a": [1]}]
)


@st.composite
def mutated(draw: st.DrawFn, body: Any) -> Any:
    """The body with one node, somewhere, replaced, removed, doubled or joined by junk."""
    if not isinstance(body, dict | list) or not body or draw(st.integers(0, 4)) == 0:
        return draw(JUNK)
    if isinstance(body, dict):
        key = draw(st.sampled_from(sorted(body, key=str)))
        kind = draw(st.sampled_from(["deeper", "remove", "add"]))
        rest = {k: v for k, v in body.items() if k != key}
        if kind == "add":
            return body | {draw(st.sampled_from(["x", "9", "layers"])): draw(JUNK)}
        return rest if kind == "remove" else {**body, key: draw(mutated(body[key]))}
    i = draw(st.integers(0, len(body) - 1))
    kind = draw(st.sampled_from(["deeper", "remove", "double"]))
    middle = {"deeper": lambda: [draw(mutated(body[i]))], "remove": list, "double": lambda: [body[i]] * 2}[kind]()
    return [*body[:i], *middle, *body[i + 1 :]]


FILES = [
    (engine, name)
    for engine in ENGINES
    for name in export(linear_placement(small_model(4, 2), 2), engine, small_model(4, 2)).files
]


@pytest.mark.parametrize(("engine", "name"), FILES)
@given(data=st.data())
@settings(max_examples=60)
def test_mutated_files_are_valid_or_refused_never_a_traceback(engine: str, name: str, data: st.DataObject) -> None:
    model = small_model(4, 2)
    text = export(linear_placement(model, 2), engine, model).files[name]
    if name.endswith(".txt") or data.draw(st.booleans()):
        at, until = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
        text = text[:at] + data.draw(st.text(max_size=5)) + text[until:]
    elif name.endswith(".yaml"):
        text = yaml.safe_dump(data.draw(mutated(yaml.safe_load(text))))
    else:
        text = json.dumps(data.draw(mutated(json.loads(text))))
    try:
        slots, refused = validate(engine, text, model, 2), ""
    except DocumentError as error:
        slots, refused = None, str(error)
    assert "\n" not in refused
    assert len(refused) < 500
    if slots is not None:
        assert len(slots) == 2
        assert len({len(rank) for layer in slots for rank in layer}) == 1
        assert all({e for rank in layer for e in rank} == set(range(4)) for layer in slots)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "\x00", "&a [*a]", "- " * 20_000])
def test_hostile_files_are_refused(engine: str, text: str) -> None:
    with pytest.raises(DocumentError) as refused:
        validate(engine, text, small_model(4, 2), 2)
    assert len(str(refused.value)) < 500

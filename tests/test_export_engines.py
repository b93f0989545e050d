"""Every engine's exporter: what it writes passes its validator and reads back."""

import json
import re
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.export import ENGINES, export, read_back, same, validate
from moeplan.planner.export.families import cell_of
from moeplan.spec.catalogue import load_model
from moeplan.spec.errors import DocumentError, MoeplanError
from moeplan.spec.placement import Placement, PlacementDevice, PlacementLayer
from moeplan.tests.exports import as_groups, linear_placement, placement_of, random_placement, small_model

EXACT = {
    "sglang": ["sglang-expert-location.json"],
    "tensorrt-llm": ["moe_load_balancer.yaml"],
    "vllm": ["experimental-initial-mapping.jsonl", "experimental-initial-expert-map.json"],
    "vllm-ascend": ["vllm-ascend-expert-map.json"],
}


@st.composite
def placements(draw: st.DrawFn, single: bool = False) -> tuple[Placement, int]:
    """A placement with equal slots, and the number of dense layers of its model."""
    devices, least = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    fewest = max(devices, devices * (least - 1) + 1)  # SGLang runs no more ranks than experts
    experts = devices * least if single else draw(st.integers(fewest, devices * least))
    size = least if single else draw(st.integers(least, max(least, min(experts, least + 2))))
    placed = random_placement(
        draw(st.integers(0, 2**32)), experts, devices, min(size, experts), draw(st.integers(1, 3))
    )
    return placed, draw(st.integers(0, 2))


def slots_of(placement: Placement) -> Any:
    return tuple(layer.slots for layer in placement.layers)


@pytest.mark.parametrize("engine", EXACT)
@given(given_=placements())
@settings(max_examples=30)
def test_round_trip_gives_the_same_slots(engine: str, given_: tuple[Placement, int]) -> None:
    placement, dense = given_
    model = small_model(placement.num_experts, len(placement.layers), dense)
    exported = export(placement, engine, model)
    assert set(EXACT[engine]) <= set(exported.files)
    for name in EXACT[engine]:
        assert read_back(engine, exported.files[name], len(placement.devices), model) == slots_of(placement)
    for text in exported.files.values():
        validate(engine, text, model, len(placement.devices))


@given(given_=placements(single=True))
@settings(max_examples=30)
def test_megatron_round_trip_up_to_the_order_on_a_rank(given_: tuple[Placement, int]) -> None:
    placement, dense = given_
    model = small_model(placement.num_experts, len(placement.layers), dense)
    exported = export(placement, "megatron", model)
    text = exported.files["expert-permutation.json"]
    assert same(read_back("megatron", text, len(placement.devices), model), slots_of(placement))
    assert json.loads(text)["layers"].keys() == {str(dense + i) for i in range(len(placement.layers))}


@given(given_=placements(single=True))
@settings(max_examples=30)
def test_deepspeed_runs_the_linear_placement_and_says_so(given_: tuple[Placement, int]) -> None:
    placement, dense = given_
    devices, experts = len(placement.devices), placement.num_experts
    model = small_model(experts, len(placement.layers), dense)
    exported = export(placement, "deepspeed", model)
    (text,) = exported.files.values()
    assert json.loads(text) == {
        "expert_parallel": {"enabled": True, "autoep_size": devices, "preset_model": "qwen3_moe"}
    }
    linear = np.arange(experts).reshape(devices, -1)
    found = read_back("deepspeed", text, devices, model)
    assert [np.array(layer).tolist() for layer in found] == [linear.tolist()] * len(placement.layers)
    dropped = any("the whole placement" in note for note in exported.notes)
    assert dropped != same(found, slots_of(placement))


@given(given_=placements())
@settings(max_examples=30)
def test_files_are_what_the_engines_documentation_says(given_: tuple[Placement, int]) -> None:
    """Read as the engines' loaders do, not by our readers."""
    placement, dense = given_
    ranks, layers, experts = len(placement.devices), len(placement.layers), placement.num_experts
    model = small_model(experts, layers, dense)
    planned = [[set(rank) for rank in layer.slots] for layer in placement.layers]

    body = json.loads(export(placement, "sglang", model).files["sglang-expert-location.json"])
    table = np.array(body.pop("physical_to_logical_map"))
    assert not body
    assert len(table) == dense + layers
    assert table.shape[1] % ranks == 0
    assert all(set(row) == set(range(experts)) for row in table)
    device = np.arange(table.shape[1]) // (table.shape[1] // ranks)
    assert [[set(row[device == r]) for r in range(ranks)] for row in table[dense:]] == planned

    body = yaml.safe_load(export(placement, "tensorrt-llm", model).files["moe_load_balancer.yaml"])
    assert body.keys() == {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    assert body["layer_updates_per_iter"] == 0
    assert body["num_slots"] % ranks == 0
    assert list(body["initial_global_assignments"]) == [dense + i for i in range(layers)]
    assert list(body["initial_global_assignments"].values()) == table[dense:].tolist()
    assert {len(row) for row in body["initial_global_assignments"].values()} == {body["num_slots"]}

    body = json.loads(export(placement, "vllm-ascend", model).files["vllm-ascend-expert-map.json"])
    assert body["moe_layer_count"] == layers
    assert [layer["layer_id"] for layer in body["layer_list"]] == list(range(layers))
    maps = [[device["device_expert"] for device in layer["device_list"]] for layer in body["layer_list"]]
    assert [[set(experts) for experts in layer] for layer in maps] == planned
    assert np.array(maps).shape == (layers, ranks, table.shape[1] // ranks)

    body = json.loads(export(placement, "vllm", model).files["experimental-initial-mapping.jsonl"])
    assert body["num_slots"] - body["num_redundant_experts"] == experts
    assert [body["initial_global_assignments"][str(i)] for i in range(layers)] == table[dense:].tolist()


def test_examples_of_the_engines_documentation_are_read() -> None:
    two = small_model(4, 2, dense=0)
    text = '{"physical_to_logical_map": [[0,1,2,3,0,1],[0,2,0,1,0,3]]}'
    assert read_back("sglang", text, 2, two) == (((0, 1, 2), (3, 0, 1)), ((0, 2, 0), (1, 0, 3)))
    text = """
num_slots: 6
initial_global_assignments:
  3: [0, 1, 2, 3, 0, 1]
  4: [0, 2, 0, 1, 0, 3]
layer_updates_per_iter: 0
"""
    model = small_model(4, 2, dense=3)
    assert read_back("tensorrt-llm", text, 2, model) == (((0, 1, 2), (3, 0, 1)), ((0, 2, 0), (1, 0, 3)))
    text = """{"moe_layer_count":1,"layer_list":[{"layer_id":0,"device_count":2,"device_list":[
 {"device_id":0,"device_expert":[7,2,0,3,5]},{"device_id":1,"device_expert":[6,1,4,7,2]}]}]}"""
    assert read_back("vllm-ascend", text, 2, small_model(8, 1)) == (((7, 2, 0, 3, 5), (6, 1, 4, 7, 2)),)
    assert read_back("vllm", "[0, 1, 2, 3, 0, 1]", 2, two) == (((0, 1, 2), (3, 0, 1)),) * 2
    assert read_back("vllm", '{"expert_to_ep_rank": [1, 0, 1, 0]}', 2, two) == (((1, 3), (0, 2)),) * 2


@pytest.mark.parametrize("engine", ENGINES)
def test_what_no_engine_can_run_is_one_line(engine: str) -> None:
    uneven = placement_of([[[0, 1, 2], [3]], [[0, 1], [2, 3]]], 4)
    between = placement_of([[[0, 1], [2, 3]], [[0, 1, 2], [2, 3, 0]]], 4)
    even = placement_of([[[0, 1], [2, 3]]] * 2, 4)
    alone = placement_of([[[0, 1, 2, 3]]] * 2, 4)
    cases = [
        (uneven, small_model(4, 2), r"layers\[0\].*1 of 1, 1 of 3 experts.*moeplan place --equal-slots"),
        (between, small_model(4, 2), r"layers\[0\] has 2 slots per device, layers\[1\] has 3.*--equal-slots"),
        (even, small_model(4, 3), "has 2 mixture-of-experts layers, model 'small' has 3"),
        (even, small_model(8, 2), "has 4 experts, layer 1 of model 'small' has 8"),
        (alone, small_model(4, 2), "1 device"),
        (even, load_model("switch-base-8"), "decoder-only"),
    ]
    for placement, model, problem in cases:
        with pytest.raises(MoeplanError, match=problem) as refused:
            export(placement, engine, model)
        assert "\n" not in str(refused.value)


def test_unknown_engine_names_the_known_ones() -> None:
    with pytest.raises(MoeplanError, match=r"nearest: tensorrt-llm.*sglang.*deepspeed"):
        export(linear_placement(small_model(4, 2), 2), "tensorrt_lm", small_model(4, 2))


def test_copies_are_refused_where_an_engine_has_none() -> None:
    copies = placement_of([[[0, 1, 2], [3, 0, 1]]] * 2, 4)
    with pytest.raises(MoeplanError, match="6 slots for 4 experts"):
        export(copies, "megatron", small_model(4, 2))
    assert any("the copies" in note for note in export(copies, "deepspeed", small_model(4, 2)).notes)
    odd = placement_of([[[0, 1], [1, 2]]] * 2, 3)
    with pytest.raises(MoeplanError, match="3 experts do not divide between 2"):
        export(odd, "deepspeed", small_model(3, 2))
    gpt = load_model("gpt-moe-8")
    with pytest.raises(MoeplanError, match=r"no preset for 'gpt_moe'.*MoE\(num_experts=8, ep_size=4, k=1\)"):
        export(linear_placement(gpt, 4), "deepspeed", gpt)


def test_dropped_shares_are_said_with_the_balance_they_cost() -> None:
    """By hand: loads 8, 2, 6 on devices {0, 1} and {0, 2}; shares 3/4, 1/4 give 8 and 8, even ones 6 and 10."""
    layer = PlacementLayer(slots=((0, 1), (0, 2)), shares=((0.75, 1.0), (0.25, 1.0)))
    placement, model = placement_of([layer], 3), small_model(3, 1)
    loads = np.array([[8.0, 2.0, 6.0]])
    for engine in ("sglang", "tensorrt-llm", "vllm", "vllm-ascend"):
        assert any("hotter than planned" in note for note in export(placement, engine, model).notes)
        notes = export(placement, engine, model, loads=loads).notes
        assert any("with even shares the balance is 1.250, planned 1.000" in note for note in notes)
    even = placement_of([PlacementLayer(slots=((0, 1), (0, 2)), shares=((0.5, 1.0), (0.5, 1.0)))], 3)
    assert not any("shares" in note for note in export(even, "tensorrt-llm", model, loads=loads).notes)
    with pytest.raises(MoeplanError, match="1 layers x 4 experts, the placement 1 x 3"):
        export(placement, "sglang", model, loads=np.ones((1, 4)))


def test_hosts_movement_and_missing_layers_are_said() -> None:
    model = small_model(4, 2, family="deepseek_v3")
    placement = placement_of([[[0], [1], [2], [3]]] * 2, 4, hosts=2, movement="coherent", model="other")
    text = "\n".join(export(placement, "sglang", model).notes)
    assert re.search(r"host0: 0-1, host1: 2-3", text)
    assert re.search("coherent movement", text)
    assert re.search("NextN", text)
    assert re.search("'other'.*'small'", text)
    assert re.search("1 dense layers", text)
    mixed = tuple(PlacementDevice(host=host, capacity=1) for host in ("a", "b", "a", "b"))
    assert (
        "not consecutive"
        in export(placement_of([[[0], [1], [2], [3]]] * 2, 4, devices=mixed), "sglang", model).notes[0]
    )


def test_vllm_flags_carry_linear_and_round_robin_placements_in_full() -> None:
    model = as_groups(small_model(4, 2))
    for slots, strategy in (([[1, 0], [2, 3]], "linear"), ([[0, 2], [1, 3]], "round_robin")):
        placement = placement_of([slots] * 2, 4)
        exported = export(placement, "vllm", model)
        assert exported.command[-2:] == ["--expert-placement-strategy", strategy]
        for text in exported.files.values():
            assert same(read_back("vllm", text, 2, model), slots_of(placement))
    exported = export(placement_of([[[0, 3], [1, 2]]] * 2, 4), "vllm", model)
    assert "--enable-eplb" in exported.command
    assert any(note.startswith("dropped") for note in exported.notes)
    with pytest.raises(DocumentError, match="no placement"):
        read_back("vllm", exported.files["vllm-flags.txt"], 2, model)
    assert json.loads(exported.files["experimental-expert-to-ep-rank.json"]) == {"expert_to_ep_rank": [0, 1, 1, 0]}
    differing = placement_of([[[0, 3], [1, 2]], [[0, 1], [2, 3]]], 4)
    assert "experimental-expert-to-ep-rank.json" not in export(differing, "vllm", model).files


@pytest.mark.parametrize("name", ["deepseek-v3", "mixtral", "gpt-oss-20b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("engine", EXACT)
def test_published_models(name: str, engine: str) -> None:
    model = load_model(name)
    if cell_of(engine, model).use == "refuse":
        with pytest.raises(MoeplanError, match=re.escape(ENGINES[engine].version)):
            export(linear_placement(model, 8), engine, model)
        return
    placement = linear_placement(model, 8)
    text = export(placement, engine, model).files[EXACT[engine][0]]
    assert read_back(engine, text, 8, model) == slots_of(placement)
    if engine == "sglang":
        assert len(json.loads(text)["physical_to_logical_map"]) == len(model.layers)


def test_longcat_layers_are_counted_as_engines_do() -> None:
    """Two blocks of ours are one layer of the engines', each with experts."""
    model = load_model("longcat-flash")
    blocks = [
        b.model_copy(update={"moe": b.moe.model_copy(update={"zero_experts": 0})}) if b.moe else b for b in model.blocks
    ]
    exported = export(linear_placement(model, 8), "sglang", model.model_copy(update={"blocks": tuple(blocks)}))
    (text,) = exported.files.values()
    assert len(json.loads(text)["physical_to_logical_map"]) == len(model.layers) // 2
    assert not any("dense" in note for note in exported.notes)


def test_paths_reach_the_engine_whatever_they_hold() -> None:
    model = small_model(4, 2)
    odd = 'a "b" \\ ü/'
    ascend = export(linear_placement(model, 2), "vllm-ascend", model, path_of=lambda name: odd + name).command[-1]
    assert json.loads(ascend)["eplb_config"]["expert_map_path"] == odd + "vllm-ascend-expert-map.json"
    options = export(linear_placement(model, 2), "tensorrt-llm", model, path_of=lambda name: odd + name).files
    options = yaml.safe_load(options["extra_llm_api_options.yaml"])
    assert options["moe_config"]["load_balancer"] == odd + "moe_load_balancer.yaml"

"""The settings' draw, files and table; nothing is measured here."""

import json

import pytest

from moeplan.benchmarks.crossover import CASES, details, fastest, picture, skewed_counts
from moeplan.benchmarks.settings import FIXED, drawn, page, row
from moeplan.benchmarks.settings_lab import CHOSEN, Setting, model_of, plans_of
from moeplan.benchmarks.synthetic_clusters import synthetic_cluster
from moeplan.spec.plan import STRATEGIES


def entry(predicted: float, *measured: float, **more: object) -> dict:
    own = {"predicted": predicted, "measured": list(measured), "spread": [0.1] * len(measured), "layers": {"ep": 4}}
    return own | {"chunks": 1} | more


PLANS = {
    "ep": entry(0.10, 0.11, 0.09),
    "sharded": entry(0.09, 0.18),
    "gathered": entry(9.0),
    CHOSEN: entry(0.09, 0.18, **{"as": "sharded"}),
}


def test_a_draw_is_of_its_seed_and_every_lab_can_be_opened():
    assert drawn(3) == drawn(3) != drawn(4)
    for seed in range(20):
        found = drawn(seed)
        assert len(set(found)) == len(found) == len(FIXED) == 12
        assert all(setting.lab.spec().ranks() for setting in found)


def test_a_row_compares_the_choice_with_the_fastest_and_counts_equal_plans_once():
    line, over, errors, own = row(FIXED[0], PLANS)
    assert over == pytest.approx(0.18 / 0.10)
    assert errors == pytest.approx([0.0, -0.5])
    assert own == pytest.approx(-0.5)
    assert "100 / 100" in line
    assert "| slow |" in line


def test_the_page_has_what_the_folder_has(tmp_path):
    FIXED[1].file(tmp_path).write_text(json.dumps({"plans": PLANS}))
    text = page({"fixed": FIXED}, tmp_path, "command")
    assert text.startswith("# 1 of 12 lab settings")
    assert "choice over the best 1.800" in text


def test_tight_memory_keeps_the_devices_from_holding_everything():
    setting = Setting(FIXED[0].lab, "tiny-moe", "decode:64@32")
    cluster = synthetic_cluster(model_of("tiny-moe"), 2, 2)
    plans = plans_of(setting, cluster)
    assert {"ep", "hierarchical", "sharded", "gathered"} <= set(plans) <= {*STRATEGIES, CHOSEN}
    experts = model_of("tiny-moe").moe_block().moe.num_experts
    assert any(len(held) < experts for held in plans["ep"].layers[0].slots)
    assert min(plan.predicted.step_seconds for plan in plans.values()) == plans[CHOSEN].predicted.step_seconds


def test_the_picture_marks_what_was_not_predicted():
    case = CASES["map"]
    found = {(rate, tokens): PLANS for rate in case.rates for tokens in case.tokens}
    assert fastest(PLANS, "predicted") == "sharded"
    assert picture(case, found).count("sharded / **ep**") == len(found)
    assert "90 / 180" in details(case, found)


def test_skewed_counts_give_a_tenth_of_the_experts_most_tokens():
    counts = skewed_counts("experts128").expert_counts
    assert counts.shape == (2, 128)
    assert [sorted(row)[-13:] == pytest.approx([0.6 / 13 * 1e6] * 13) for row in counts] == [True, True]

"""Plans for many devices: groups of devices that hold the same are written once."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moeplan.spec.plan import SPELLED_OUT, LayerPlan


@given(st.integers(1, 6), st.integers(1, 80), st.booleans())
def test_what_is_written_is_read_again(each: int, groups: int, shared: bool) -> None:
    group = tuple((device, each + device % 2) for device in range(each))
    shares = tuple((1.0 / groups, 0.0) for _ in range(each)) if shared else None
    if shares is not None:  # the shares of an expert sum to 1
        group = tuple((device,) for device in range(each))
        shares = tuple((1.0 / groups,) for _ in range(each))
    plan = LayerPlan(strategy="ep", slots=group * groups, shares=shares and shares * groups)
    text = json.dumps(plan.model_dump(mode="json"))
    again = LayerPlan.model_validate_json(text, strict=True)
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.repeats == 1
    body = json.loads(text)
    if each * groups > SPELLED_OUT and groups > 1:
        assert len(body["slots"]) * body["repeats"] == each * groups
        assert len(body["slots"]) <= each
    else:
        assert (body["repeats"], len(body["slots"])) == (1, each * groups)


def test_an_earlier_plan_has_no_repeats() -> None:
    body = {"strategy": "ep", "slots": [[0], [1]] * 64}
    assert len(LayerPlan.model_validate_json(json.dumps(body), strict=True).slots) == 128


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"repeats": 5000}, "less than or equal to 4096"),
        ({"repeats": 4096}, "4096 groups have more than 4,096 devices"),
        ({"repeats": True}, "valid integer"),
        ({"repeats": 0}, "greater than or equal to 1"),
        ({"slots": 5, "repeats": 2}, "valid array"),
        ({"slots": [["a"], [1]], "repeats": 2}, "valid integer"),
        ({"shares": [[1.0], [1.0]], "repeats": 2}, "sum to 2"),
    ],
)
def test_wrong_repeats_are_refused(change: dict, reason: str) -> None:
    body = {"strategy": "ep", "slots": [[0], [1]]} | change
    with pytest.raises(ValidationError, match=reason):
        LayerPlan.model_validate_json(json.dumps(body), strict=True)

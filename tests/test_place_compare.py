"""`moeplan compare`: which placement is better in what, and which do not go together."""

import pytest

from moeplan.planner.place.compare import compare as between
from moeplan.spec.errors import MoeplanError
from moeplan.spec.placement import (
    Placement,
    Score,
    Scores,
    TraceSource,
)
from moeplan.tests.explained import HAND, HOSTS, SPLIT, placement_of, random_placement


def test_each_is_better_in_something() -> None:
    # B joins the pairs (nothing crosses), and is as hot; A is cooler with 0 and 3 together.
    a = placement_of([[[0, 1], [2, 3]], [[0, 1], [2, 3]]], HOSTS, HAND)
    b = placement_of([[[0, 1], [2, 3]], [[0, 2], [1, 3]]], HOSTS, HAND)
    found = between(a, b, HAND)
    assert (found.a["fit"].boundary_cross_host, found.b["fit"].boundary_cross_host) == (1.0, 0.0)
    better = {d.measure: d.better for d in found.differences}
    assert better["boundary_cross_host"] == "B"
    assert better["balance_mean"] == "same"
    assert found.changed == (0, 2)
    assert found.copies == (0, 2)
    assert found.verdict == (
        "B is better on the fitted part in boundaries that cross hosts (0 against 1, -100.0%); "
        "boundaries that cross devices (0 against 1, -100.0%)",
    )
    same = between(a, a, HAND)
    assert same.verdict == ("neither is better on the fitted part: all scores are the same within 0.5%",)
    swapped = between(b, a, HAND)
    assert swapped.verdict[0].startswith("A is better on the fitted part in boundaries that cross hosts (0 against 1")


def test_without_a_trace_the_documents_speak() -> None:
    scores = [Scores(fit=Score(tokens=9, balance_mean=x, balance_max=x), held_out=None) for x in (1.2, 1.1)]
    a, b = (
        placement_of(SPLIT, HOSTS, HAND, scores={"linear": scores[0], "placement": own, "eplb": scores[0]})
        for own in scores
    )
    found = between(a, b, None)
    assert not found.rescored
    assert (found.a["fit"].balance_mean, found.b["fit"].balance_mean) == (1.2, 1.1)
    assert "B is better on the fitted part in everything that is scored" in found.verdict[0]
    assert not any("different traces" in note for note in found.notes)
    other = b.model_copy(update={"trace": TraceSource(digest="feed")})
    assert any("different traces" in note for note in between(a, other, None).notes)
    empty = placement_of(SPLIT, HOSTS, HAND)
    assert between(empty, a, None).verdict == ("no scores to compare: pass a trace with --trace",)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (random_placement(0, 3, 4, 2, 2), "A has 2 layers, B 3"),
        (random_placement(0, 2, 6, 2, 2), "A has 4 experts, B 6"),
        (random_placement(0, 2, 4, 4, 2), "A has 2 devices, B 4"),
    ],
)
def test_other_shapes_are_refused(other: Placement, reason: str) -> None:
    with pytest.raises(MoeplanError, match=reason) as refused:
        between(placement_of(SPLIT, HOSTS), other, None)
    assert "\n" not in str(refused.value)

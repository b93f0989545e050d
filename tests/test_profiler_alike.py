"""Which measured devices, links and groups count as one, and what becomes of those that do not."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.profiler import merge
from moeplan.profiler.alike import NUMBER, POINTS, SYSTEMATIC, within_spread
from moeplan.spec import Cluster
from moeplan.spec.cluster.measurement import Measurement
from moeplan.spec.cluster.sameness import Sample, by_class
from moeplan.spec.curve import Axis, Curve
from moeplan.tests.spelled_out import spelled_out
from moeplan.tests.synthetic import cluster, tiny_model


def curve(seconds: list[float], spread: float = 0.1) -> Curve:
    axis = Axis(name="bytes", values=tuple(float(2**i) for i in range(len(seconds))))
    return Curve(axes=(axis,), median=tuple(seconds), spread=(spread,) * len(seconds))


def agree(a: Sample, b: Sample) -> bool:
    """The rule, one curve and point at a time."""
    if [c.axes for c in a.curves] != [c.axes for c in b.curves]:
        return False
    for x, y in zip(a.curves, b.curves, strict=True):
        apart = [np.log(p) - np.log(q) for p, q in zip(x.median, y.median, strict=True)]
        allowed = [max(SYSTEMATIC, *both) for both in zip(x.spread, y.spread, strict=True)]
        inside = sum(abs(d) <= most for d, most in zip(apart, allowed, strict=True))
        if inside < POINTS * len(apart) or abs(sum(apart)) > SYSTEMATIC * len(apart):
            return False
    return all(abs(np.log(p) - np.log(q)) <= NUMBER for p, q in zip(a.numbers, b.numbers, strict=True))


values = st.floats(0.93, 1.07)
samples = st.builds(
    lambda factors, spread, number, points: Sample(
        (number,), (curve([1e-3 * f for f in factors[:points]], spread), curve([2e-3 * f for f in factors], spread))
    ),
    st.lists(values, min_size=4, max_size=4),
    st.sampled_from([0.0, 0.05, 0.5]),
    values,
    st.sampled_from([3, 4]),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(samples, min_size=1, max_size=12))
def test_all_of_one_label_agree_with_one_among_them(drawn: list[Sample]) -> None:
    labels = within_spread(drawn)
    assert len(labels) == len(drawn)
    for label in set(labels):
        members = [sample for sample, of in zip(drawn, labels, strict=True) if of == label]
        assert any(all(agree(one, other) for other in members) for one in members)


def test_what_tells_two_apart() -> None:
    base = [1e-3] * 10
    alike = Sample((1e9,), (curve(base),))

    def same(other: Sample) -> bool:
        return len(set(within_spread([alike, other]))) == 1

    assert same(alike)
    assert same(Sample((1.04e9,), (curve([1.08e-3, 0.93e-3] * 5),)))  # noise within the spread
    assert same(Sample((1e9,), (curve([1.2e-3, *base[1:9], 0.92e-3]),)))  # one point of ten beyond it
    assert not same(Sample((1e9,), (curve([1.2e-3, 0.8e-3, *base[2:]]),)))  # two
    assert not same(Sample((1e9,), (curve([1.04e-3] * 10, spread=0.5),)))  # slower everywhere, however noisy
    assert not same(Sample((1.06e9,), (curve(base),)))
    assert not same(Sample((1e9,), (curve(base[:9]),)))


def jittered(measured: Measurement, by: float) -> Measurement:
    """Every curve with noise of its own, of about its spread."""
    rng = np.random.default_rng(0)

    def shaken(value):
        if isinstance(value, dict) and "median" in value:
            noise = np.tile([1 + by, 1 - by], len(value["median"]))[: len(value["median"])] * (
                1 + rng.uniform(0, 0.005)
            )
            return value | {"median": (np.array(value["median"]) * noise).tolist(), "spread": [2.2 * by] * len(noise)}
        if isinstance(value, dict):
            return {name: shaken(item) for name, item in value.items()}
        return [shaken(item) for item in value] if isinstance(value, list) else value

    return Measurement.model_validate(shaken(measured.model_dump(mode="json")))


def test_devices_that_differ_stay_apart_and_the_rest_is_said_once() -> None:
    made = cluster(tiny_model(), ((1.0, 1.0), (0.5, 0.5)))
    measured = jittered(spelled_out(made), 0.05)
    exact, found = by_class(measured), by_class(measured, within_spread)
    assert (len(exact.kinds), len(exact.link_classes)) == (4, 12)
    assert [device.kind for device in found.devices] == ["synthetic"] * 2 + ["synthetic (2)"] * 2
    assert [link.name for link in found.link_classes] == ["host", "cluster"]
    assert not found.link_exceptions
    shapes = {entry.members: entry for entry in found.collectives if entry.members}
    assert set(shapes) == {(2,)}  # the group of all was measured once, and stays its own
    for i in range(4):
        for mine, theirs in zip(found.kind_of(i).operators, exact.kind_of(i).operators, strict=True):
            assert mine.key == theirs.key
            np.testing.assert_allclose(mine.curve.median, theirs.curve.median, rtol=0.02)
    assert Cluster.parse(found.to_json(), "c") == found


def test_a_kind_that_was_two_before_becomes_two_that_share_links_and_groups() -> None:
    new = cluster(tiny_model(), ((1.0, 1.0), (1.0, 1.0)))
    limited = tuple(c.model_copy(update={"kinds": ("speed 1",)}) for c in new.collectives)
    rules = tuple(r.model_copy(update={"source": "speed 1"}) for r in new.link_rules)
    new = new.model_copy(update={"collectives": limited, "link_rules": rules})
    before = cluster(tiny_model(hidden=128), ((1.0, 0.5), (1.0, 1.0)))
    product = {"product": "synthetic"}
    merged = merge(before.model_copy(update={"kinds": tuple(k.model_copy(update=product) for k in before.kinds)}), new)
    merged = Cluster.parse(merged.to_json(), "merged")
    assert [device.kind for device in merged.devices] == ["speed 1", "speed 1 (2)", "speed 1", "speed 1"]
    assert merged.kinds[1].family == "speed 1"
    for i in range(4):
        known = {entry.key: entry.curve for entry in merged.kind_of(i).operators}
        for entry in (*new.kind_of(i).operators, *before.kind_of(i).operators):
            newer = {e.key: e.curve for e in new.kind_of(i).operators}
            assert known[entry.key] == newer.get(entry.key, entry.curve)
    assert merged.link(1, 2).name == "cluster"
    for group in ((0, 1), (0, 1, 2, 3)):
        assert merged.collective("all_gather", group) == new.collective("all_gather", group)

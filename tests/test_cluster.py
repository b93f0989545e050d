"""Clusters by class: what is looked up, what hand-written files may say, and that old files answer the same."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.spec import Cluster
from moeplan.spec.cluster import SCOPES, LinkException, LinkRule
from moeplan.spec.cluster.measurement import Measurement
from moeplan.spec.cluster.sameness import by_class
from moeplan.spec.errors import DocumentError, MissingCurveError
from moeplan.spec.operators import COLLECTIVES
from moeplan.tests.documents import changed, cluster_body, curve, refused, text
from moeplan.tests.spelled_out import first_version, spelled_out
from moeplan.tests.synthetic import cluster, tiny_model

PROVENANCE = {"created": "now", "command": "test", "versions": {}, "seconds": 1.0, "models": ["tiny"]}
NVML = [{}, {}, {"topology": "gpu1: PIX, gpu2: SYS"}, {"topology": "gpu0: PIX, gpu2: SYS"}, {"topology": "gpu0: SYS"}]


def drawn_curve(draw, axis: str = "bytes") -> dict[str, Any]:
    """One of few, so that equal ones are common."""
    scale = draw(st.sampled_from([1.0, 1.0, 1.0, 2.0, 3.0]))
    return curve(axis) | {"median": [scale * 1e-6, scale * 1e-3]}


@st.composite
def measurements(draw) -> Measurement:
    """Any measurement of version 1: a few devices of a few kinds on a few hosts, links and groups partly alike."""
    count = draw(st.integers(1, 7))
    hosts = [f"h{draw(st.integers(0, 2))}" for _ in range(count)]
    shape = {"hidden": 8, "experts": 4, "top_k": 2}
    devices = [
        {
            "host": host,
            "kind": "cpu",
            "name": draw(st.sampled_from(["x", "y"])),
            "memory_bytes": draw(st.sampled_from([2**30, 2**31])),
            "cpu_share": draw(st.sampled_from([1.0, 1.0, 0.5])),
            "details": draw(st.sampled_from(NVML)),
            "stream_bandwidth": draw(st.sampled_from([1e10, 1e10, 2e10])),
            "operators": [
                {
                    "operator": "route",
                    "shape": shape | {"hidden": h},
                    "dtype": "f32",
                    "curve": drawn_curve(draw, "tokens"),
                }
                for h in draw(st.lists(st.sampled_from([8, 16]), max_size=3))
            ],
        }
        for host in hosts
    ]
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    links = [
        {"source": i, "target": j, "latency": 1e-5, "curve": drawn_curve(draw)} for i, j in draw(st.permutations(pairs))
    ]
    groups = st.lists(st.integers(0, count - 1), min_size=2, max_size=count, unique=True) if count > 1 else st.nothing()
    collectives = [
        {
            "collective": draw(st.sampled_from(COLLECTIVES)),
            "group": group,
            "traffic": draw(st.sampled_from(["equal", "equal", "skewed"])),
            "curve": drawn_curve(draw),
            "busy": drawn_curve(draw),
        }
        for group in (draw(st.lists(groups, max_size=8)) if count > 1 else [])
    ]
    return Measurement.model_validate_json(
        json.dumps(
            {
                "devices": devices,
                "hosts": [{"name": name, "uplink_out": 1e9} for name in dict.fromkeys(hosts)],
                "links": links,
                "collectives": collectives,
                "lab": draw(st.sampled_from([None, "lab"])),
                "provenance": PROVENANCE,
            }
        )
    )


@settings(max_examples=150, deadline=None)
@given(measurements())
def test_an_old_file_answers_the_same_by_class(measured: Measurement) -> None:
    found = Cluster.parse(first_version(measured), "old.json")
    assert found == by_class(measured)
    assert (found.hosts, found.lab, found.provenance) == (measured.hosts, measured.lab, measured.provenance)
    for i, device in enumerate(measured.devices):
        kind, here = found.kind_of(i), found.devices[i]
        for name in ("threads", "cpu_share", "stream_bandwidth", "copies"):
            assert getattr(kind, name) == getattr(device, name)
        assert (kind.type, kind.product) == (device.kind, device.name)
        assert (here.host, here.memory_bytes, here.details) == (device.host, device.memory_bytes, device.details)
        assert found.hosts[found.host_of(i)].name == device.host
        assert len(kind.operators) == len({entry.key for entry in device.operators})
        for key in {entry.key for entry in device.operators}:
            first = next(entry for entry in device.operators if entry.key == key)
            assert found.operator(i, first.operator, first.shape, first.dtype, "tiny") == first.curve
    everyone = np.arange(len(measured.devices))
    classes = found.link_class_index(everyone[:, None], everyone[None, :])
    assert (np.diag(classes) == -1).all()
    for link in measured.links:
        answer = found.link(link.source, link.target)
        assert (answer.latency, answer.curve) == (link.latency, link.curve)
        assert found.link_classes[classes[link.source, link.target]] == answer
    for entry in measured.collectives:
        if entry.traffic == "equal":
            same = [
                e
                for e in measured.collectives
                if (e.collective, e.group, e.traffic) == (entry.collective, entry.group, "equal")
            ]
            answer = found.collective(entry.collective, entry.group)
            assert (answer.curve, answer.busy) == (same[0].curve, same[0].busy)
    assert Cluster.parse(found.to_json(), "new.json") == found


def nested(switches: int = 2) -> Cluster:
    """Eight devices of two kinds on four hosts in two racks, two switches on each host."""
    base = cluster(tiny_model(), ((1.0, 0.5),) * 4)
    link = base.link_classes[0]
    return Cluster(
        kinds=base.kinds,
        devices=tuple(d.model_copy(update={"switch": f"s{i % switches}"}) for i, d in enumerate(base.devices)),
        hosts=tuple(h.model_copy(update={"rack": f"r{i // 2}"}) for i, h in enumerate(base.hosts)),
        link_classes=tuple(link.model_copy(update={"name": name}) for name in (*SCOPES, "fast", "odd")),
        link_rules=(
            *(LinkRule(scope=scope, link=scope) for scope in SCOPES),
            LinkRule(scope="cluster", source="speed 1", link="odd"),
            LinkRule(scope="cluster", source="speed 1", target="speed 1", link="fast"),
        ),
        link_exceptions=(LinkException(source=0, target=7, link="host"), LinkException(source=7, target=0, link="odd")),
        provenance=base.provenance,
    )


def plain_class(found: Cluster, i: int, j: int) -> str:
    """The rules, read as they are written, for one pair."""
    for entry in found.link_exceptions:
        if (entry.source, entry.target) == (i, j):
            return entry.link
    a, b = found.devices[i], found.devices[j]
    racks = [found.hosts[found.host_of(d)].rack for d in (i, j)]
    inside = "switch" if a.switch is not None and a.switch == b.switch else "host"
    scope = inside if a.host == b.host else "rack" if racks[0] is not None and racks[0] == racks[1] else "cluster"
    fits = [
        ((rule.source is not None) + (rule.target is not None), rule.link)
        for rule in found.link_rules
        if rule.scope == scope and rule.source in (None, a.kind) and rule.target in (None, b.kind)
    ]
    return max(fits)[1]


@pytest.mark.parametrize("switches", [1, 2])
def test_scopes_nest_and_the_rule_that_names_more_decides(switches: int) -> None:
    found = nested(switches)
    count = len(found.devices)
    everyone = np.arange(count)
    classes = found.link_class_index(everyone[:, None], everyone[None, :])
    counts = np.zeros_like(found.link_counts())
    for i in range(count):
        for j in range(count):
            if i != j:
                assert found.link_classes[classes[i, j]].name == plain_class(found, i, j) == found.link(i, j).name
                scope = int(found.scope_index([i], [j])[0])
                counts[scope, classes[i, j]] += 1
    assert (counts == found.link_counts()).all()
    assert found.link_class_index([3, 0], [3, 1]).tolist() == [-1, classes[0, 1]]
    with pytest.raises(ValueError, match="no link to itself"):
        found.link(2, 2)


def test_the_curve_of_a_group_is_its_own_else_that_of_its_shape_which_is_limited_most() -> None:
    base = nested()
    like = cluster(tiny_model()).collectives[0].model_copy(update={"collective": "all_gather"})
    limits = [
        {"members": (1, 1)},
        {"members": (1, 1), "scope": "cluster"},
        {"members": (1, 1), "kinds": ("speed 0.5", "speed 1")},
        {"members": (1, 1), "kinds": ("speed 1",), "scope": "rack"},
        {"members": None, "group": (0, 6)},
    ]
    entries = tuple(like.model_copy(update=limit) for limit in limits)
    found = Cluster.model_validate(base.model_copy(update={"collectives": entries}).model_dump())
    asked = {(0, 2): 3, (1, 3): 0, (0, 3): 2, (1, 5): 1, (0, 5): 2, (0, 6): 4, (6, 0): 1, (2, 4): 1}
    assert {group: entries.index(found.collective("all_gather", group)) for group in asked} == asked
    with pytest.raises(MissingCurveError, match=r"no all_gather curve for devices \[0, 1, 2\] \(3 devices, 2\+1 on 2 "):
        found.collective("all_gather", (0, 1, 2))
    with pytest.raises(MissingCurveError, match="no all_reduce curve"):
        found.collective("all_reduce", (0, 2))


def test_what_is_copied_with_other_devices_answers_for_those() -> None:
    made = cluster(tiny_model(), ((1.0, 1.0), (1.0, 1.0)))
    assert made.host_of(3) == 1
    moved = made.model_copy(update={"devices": tuple(d.model_copy(update={"host": "host0"}) for d in made.devices)})
    assert moved.host_of(3) == 0
    assert moved.link(0, 3).name == "host"


def rule(scope: str = "host", link: str = "host", **kinds: str) -> dict[str, Any]:
    return {"scope": scope, "link": link, **kinds}


def pair(source: int, target: int, link: str = "host") -> dict[str, Any]:
    return {"source": source, "target": target, "link": link}


def two(**fields: Any) -> dict[str, Any]:
    return cluster_body() | fields


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"link_rules": []}, "no link rule covers devices 0 to 1 (scope host, 'processor' to 'processor'): add one"),
        ({"link_rules": [rule(scope="cluster")]}, "no link rule covers devices 0 to 1"),
        ({"link_rules": [rule(), rule()]}, "link_rules[0] and [1] both say"),
        ({"link_rules": [rule(source="processor"), rule(target="processor")]}, "link_rules[0] and [1] both say"),
        ({"link_rules": [rule(link="nvlink")]}, "link_rules[0].link 'nvlink' is not among link_classes"),
        ({"link_rules": [rule(source="gpu")]}, "link_rules[0].source 'gpu' is not among kinds"),
        ({"link_rules": [rule(scope="pod")]}, "link_rules[0].scope"),
        ({"link_exceptions": [pair(0, 2)]}, "link_exceptions[0]: 0 to 2 is no pair of two of the 2 devices"),
        ({"link_exceptions": [pair(1, 1)]}, "link_exceptions[0]: 1 to 1 is no pair of two of the 2 devices"),
        ({"link_exceptions": [pair(-1, 1)]}, "link_exceptions[0].source"),
        ({"link_exceptions": [pair(0, 1, "x")]}, "link_exceptions[0].link 'x' is not among link_classes"),
        ({"link_exceptions": [pair(0, 1), pair(0, 1)]}, "link_exceptions[1]: 0 to 1 has an exception already"),
        ({"link_classes": cluster_body()["link_classes"] * 2}, "link class names repeat"),
        ({"kinds": cluster_body()["kinds"] * 2}, "kind names repeat"),
        ({"devices": cluster_body()["devices"] * 8193}, "devices: Tuple should have at most 16384 items"),
        (
            {
                "kinds": [cluster_body()["kinds"][0] | {"name": name} for name in ("processor", *map(str, range(257)))],
                "link_rules": [rule(), *(rule(source=str(i)) for i in range(257))],
            },
            "link_rules name 257 kinds, at most 256: give alike kinds a family",
        ),
        ({"collectives": cluster_body()["collectives"] * 2}, "collectives[1]: a curve of all_gather over the same"),
    ],
)  # fmt: skip
def test_what_a_hand_written_file_may_not_say(fields: dict[str, Any], complaint: str) -> None:
    assert complaint in refused(Cluster, text(Cluster, two(**fields)))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"members": None, "group": [0, 2]}, "collectives[0].group must name two or more of the 2 devices"),
        ({"members": None, "group": [0, 0]}, "collectives[0].group must name two or more of the 2 devices"),
        ({"members": None}, "needs either group (exact devices) or members"),
        ({"group": [0, 1]}, "needs either group (exact devices) or members"),
        ({"members": None, "group": [0, 1], "scope": "host"}, "kinds and scope go with members"),
        ({"members": [1]}, "members must be two or more in all, most first, got [1]"),
        ({"members": [1, 2]}, "members must be two or more in all, most first"),
        ({"members": []}, "members must be two or more in all"),
        ({"members": [3, 0]}, "members must be two or more in all"),
        ({"kinds": ["gpu"]}, "collectives[0].kinds: no device is of kind 'gpu'"),
        ({"kinds": ["processor", "processor"]}, "kinds repeat"),
        ({"busy": curve("tokens")}, "all_gather needs axes"),
    ],
)
def test_what_a_collective_may_not_say(changes: dict[str, Any], rule: str) -> None:
    entry = cluster_body()["collectives"][0] | changes
    assert rule in refused(Cluster, text(Cluster, two(collectives=[entry])))


def test_an_operator_is_there_once() -> None:
    once = cluster_body()["kinds"][0]["operators"][0]
    body = changed(
        cluster_body(), ("kinds", 0, "operators"), [once, once | {"shape": dict(reversed(once["shape"].items()))}]
    )
    assert "operators[1]: route of this shape and dtype is there twice" in refused(Cluster, text(Cluster, body))


def test_a_broken_old_file_is_refused_by_its_own_fields() -> None:
    body = json.loads(first_version(spelled_out(cluster(tiny_model()))))
    for path, value, rule in (
        (("links",), [], "links must hold every ordered pair of 4 devices once"),
        (("links", 1, "source"), 9, "links must hold every ordered pair of 4 devices once"),
        (("devices", 1, "host"), "b", "devices[1].host 'b' is not among hosts"),
        (("collectives", 0, "group"), [0, 9], "collectives[0].group must name"),
        (("devices", 0, "name"), 3, "devices[0].name"),
    ):
        with pytest.raises(DocumentError) as caught:
            Cluster.parse(json.dumps(changed(body, path, value)), "old.json")
        assert rule in str(caught.value)


def test_a_kind_says_what_to_measure_without_a_device() -> None:
    kind = cluster(tiny_model()).kinds[0]
    with pytest.raises(
        MissingCurveError, match=r"no embed curve \(hidden 1, f32\) for devices of kind speed 1: measure"
    ):
        kind.operator("embed", {"hidden": 1}, "f32", "tiny")


def test_a_shape_that_was_measured_on_one_kind_only_says_nothing_of_others() -> None:
    made = cluster(tiny_model(), ((1.0,) * 4, (0.5,) * 4))
    found = by_class(spelled_out(made, [(0, 1), (2, 3)]))
    assert found.collective("all_gather", (0, 2)).members == (2,)
    with pytest.raises(MissingCurveError, match=r"no all_gather curve for devices \[4, 5\]"):
        found.collective("all_gather", (4, 5))
    both = by_class(spelled_out(made, [(0, 1), (4, 5)]))
    assert both.collective("all_gather", (4, 6)).kinds is None

"""`moeplan explain cluster.json` as a user types it, its picture, and the examples of docs/clusters.md."""

import json
import re
import sys
from pathlib import Path

import pytest

from moeplan.planner.topology import exceptions, exchange_loads, graph_of, loads
from moeplan.service import cli
from moeplan.service.commands.explain import devices_of
from moeplan.service.pages.topology_picture import MOST_DRAWN, draw_topology, drawn_devices
from moeplan.spec import Cluster, MoeplanError
from moeplan.spec.cluster import Topology
from moeplan.tests.synthetic import cluster, tiny_model

PAGE = Path(__file__).parents[1] / "docs" / "clusters.md"


def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, *argv: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["moeplan", *argv])
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0), *capfd.readouterr()


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    cluster(tiny_model(), ((1.0, 1.0), (0.5, 0.5))).write("cluster.json")
    return tmp_path


def test_it_says_what_there_is_and_where_an_exchange_waits(there, monkeypatch, capfd) -> None:
    code, out, err = run(monkeypatch, capfd, "explain", "cluster.json", "--picture", "topology.png")
    assert code == 0, err
    assert "4 device(s) of 2 kind(s) on 2 host(s)" in out
    assert "4 of 12 transfers go through it, at 1 GB/s" in " ".join(out.split())
    assert re.search(r"speed 0.5 .*synthetic .* 2 ", out)
    assert re.search(r"cluster +cluster +8 ", out)
    assert (there / "topology.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(monkeypatch, capfd, "explain", "cluster.json", "--group", "0-1", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["group"] == [0, 1]
    assert found["kinds"] == [{"name": "speed 1", "devices": 2}, {"name": "speed 0.5", "devices": 2}]
    assert {edge["pairs"] for edge in found["edges"]} == {1}


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["cluster.json", "--group", "0-4"], "--group '0-4': devices such as 0-7,12 of 0 to 3"),
        (["cluster.json", "--group", "0"], "two or more"),
        (["cluster.json", "--group", "0-1,1"], "none twice"),
        (["cluster.json", "--group", "a"], "--group 'a'"),
        (["cluster.json", "--group", "0-999999"], "--group '0-999999'"),
        (["cluster.json", "--trace", "t.npz"], "--trace goes with a placement, cluster.json is a cluster"),
        (["cluster.json", "--picture", "t.jpeg"], "no picture of kind"),
        (["none.json"], "none.json: no such file"),
        (["other.json", "--group", "0-1"], "--group goes with a cluster, other.json is none"),
        (["other.json"], "other.json: kind: expected 'moeplan.placement'"),
    ],
)
def test_what_is_wrong_is_one_line(there, monkeypatch, capfd, argv: list[str], complaint: str) -> None:
    tiny_model().write("other.json")
    code, out, err = run(monkeypatch, capfd, "explain", *argv)
    assert code == 2
    assert not out
    assert complaint in " ".join(err.split())
    assert "Traceback" not in err


def test_a_bad_cable_is_seen(there, monkeypatch, capfd) -> None:
    Path("bad.json").write_text(re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.S)[0])
    code, out, err = run(monkeypatch, capfd, "explain", "bad.json", "--picture", "bad.svg")
    assert code == 0, err
    assert "waits for device 0 to device 3: 1 of 12 transfers go through it, at 2.5 GB/s" in " ".join(out.split())
    assert re.search(r"bad cable \(exception: 0 to 3\) +1 ", out)
    drawn = Path("bad.svg").read_text()
    assert "<!-- 0 to 3: 2.5 GB/s -->" in drawn
    assert "<!-- differs from its class, as measured -->" in drawn


def test_one_device_alone_is_told_too(there, monkeypatch, capfd) -> None:
    cluster(tiny_model(), ((1.0,),)).write("cluster.json")
    code, out, err = run(monkeypatch, capfd, "explain", "cluster.json", "--picture", "one.svg")
    assert code == 0, err
    assert "1 device(s) of 1 kind(s) on 1 host(s)" in out


def test_groups_are_ranges_and_numbers() -> None:
    assert devices_of("0-2, 5", 8) == (0, 1, 2, 5)
    with pytest.raises(MoeplanError):
        devices_of("", 8)


def test_of_many_devices_alike_hosts_are_drawn_once(tmp_path: Path) -> None:
    many = cluster(tiny_model(), ((1.0,) * 4, (0.5,) * 4) * 20)
    drawn, notes = drawn_devices(many)
    assert drawn == list(range(8))
    assert len(drawn) <= MOST_DRAWN < len(many.devices)
    assert notes == [f"host{i} stands for 20 host(s) that are alike" for i in (0, 1)]
    graph = graph_of(many)
    found = loads(graph, range(8))
    for name in ("a.svg", "b.svg"):
        draw_topology(many, graph, found, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()


def test_the_page_on_clusters_shows_a_file_that_is_read() -> None:
    whole, topology = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.S)
    found = Cluster.parse(whole, "docs")
    names = [[found.link(i, j).name for j in range(4) if j != i] for i in range(4)]
    assert names[0] == ["nvlink", "ethernet", "bad cable"]
    assert names[3] == ["ethernet", "ethernet", "pcie"]
    assert found.collective("all_to_all", (0, 1, 2, 3)).members == (2, 2)
    worst = exchange_loads(found, graph_of(found), range(4))[0]
    assert (worst.edge, worst.pairs, worst.rate) == (("device 0", "device 3"), 1, pytest.approx(2.5e9))
    assert not exceptions(found, (0, 1, 2))
    Topology.model_validate_json(topology).check(4, found.hosts)

"""Clusters by name: from the command line, from a file, and beside measured ones."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeplan.planner.described import cluster_of, joined
from moeplan.planner.serving_search.classes import classes_of
from moeplan.service.app import app
from moeplan.spec.cluster import MAX_CLUSTER_DEVICES, Cluster
from moeplan.spec.described import TEMPLATE, Described, parse_device, read_described
from moeplan.spec.errors import MissingCurveError, MoeplanError
from moeplan.spec.quantities import parse_rate, parse_seconds
from moeplan.spec.tabled import System
from moeplan.tests.documents import cluster_body

GIB = 2**30


def sheet(name: str) -> System:
    """Data sheets of two types of GPU."""
    known = {
        "fast": System("fast", "hopper", 80 * GIB, 3.35e12, {"bfloat16": 9e14}, 4.5e11, 5e10, 6.4e10, 8),
        "slow": System("slow", "ada", 45 * GIB, 8.6e11, {"bfloat16": 3e14}, 3.2e10, 5e10, 3.2e10, 8),
    }
    return known[name]


def made(*devices: str, between: str | None = None) -> Cluster:
    described = Described(devices=tuple(parse_device(text) for text in devices), between=between)
    return cluster_of(described, sheet, "test tables", "test")


def test_kinds_hosts_and_links() -> None:
    cluster = made("fast:2x8", "slow:1x4", between="400Gb/s")
    assert [kind.tabled.system for kind in cluster.kinds if kind.tabled] == ["fast", "slow"]
    assert len(cluster.devices) == 20
    assert len(cluster.hosts) == 3
    assert cluster.link(0, 7).name == "inside fast hosts"
    assert cluster.link(16, 19).name == "inside slow hosts"
    assert cluster.link(0, 8).bandwidth == pytest.approx(5e10, rel=0.01)
    assert cluster.link(0, 19).bandwidth == pytest.approx(5e10, rel=0.01)
    assert cluster.link(0, 7).bandwidth == pytest.approx(4.5e11, rel=0.01)
    assert cluster.hosts[0].uplink_out == pytest.approx(8 * 5e10)
    assert "tabled" in cluster.provenance.warnings[0]
    assert [(c.kind, c.gpus, c.per_host) for c in classes_of(cluster)[0]] == [("fast", 16, 8), ("slow", 4, 4)]


def test_a_document_that_is_read_again(tmp_path: Path) -> None:
    cluster = made("fast:2x8", "slow:1x4", "fast:1x4")
    assert Cluster.read(cluster.write(tmp_path / "c.json")) == cluster


def test_ten_thousand_gpus_are_a_small_document(tmp_path: Path) -> None:
    cluster = made("fast:1000x8", "slow:250x8")
    path = cluster.write(tmp_path / "c.json")
    assert path.stat().st_size < 3e6
    assert Cluster.read(path) == cluster
    assert [c.gpus for c in classes_of(cluster)[0]] == [8000, 2000]
    assert cluster.link_counts().sum() == 10_000 * 9_999


def test_cards_switches_and_racks(tmp_path: Path) -> None:
    (tmp_path / "d.yaml").write_text(
        "devices:\n  - {gpu: fast, hosts: 4, gpus: 8, nics: 4, nic_rate: 25GB/s, switches: 2, hosts_per_rack: 2}\n"
        "between_racks: 10GB/s\n"
    )
    cluster = cluster_of(read_described(tmp_path / "d.yaml"), sheet, "t", "c")
    assert cluster.hosts[0].uplink_out == pytest.approx(1e11)
    assert [cluster.devices[i].switch for i in (0, 3, 4)] == ["switch-0", "switch-0", "switch-1"]
    assert cluster.link(0, 8).bandwidth == pytest.approx(2.5e10, rel=0.01)  # one card
    assert cluster.link(0, 16).bandwidth == pytest.approx(1e10, rel=0.01)
    assert cluster.hosts[1].rack != cluster.hosts[2].rack


def test_measured_devices_beside_them() -> None:
    measured = Cluster.model_validate(cluster_body() | {"topology": None})
    both = joined(made("fast:1x8"), measured, 1e9)
    assert both.devices[:2] == measured.devices
    assert both.link(1, 0) == measured.link(1, 0)
    assert both.link(0, 5).bandwidth == pytest.approx(1e9, rel=0.01)
    assert both.link(5, 0).name == both.link(0, 5).name
    assert both.link(3, 4).name == "inside fast hosts"
    classes, notes = classes_of(both)
    assert [c.kind for c in classes] == ["fast"]
    assert "2 devices of kind 'processor' are left out" in notes[0]
    with pytest.raises(MoeplanError, match="both clusters have a kind"):
        joined(made("fast:1x8"), made("fast:1x2"), 1e9)


@pytest.mark.parametrize("text", ["h100", "h100:2", "h100:0x8", "h100:2x0", "h100:2x8x1", "a b:1x1", "h100:999999x8"])
def test_a_wrong_device_is_one_line(text: str) -> None:
    with pytest.raises(MoeplanError, match="--device"):
        parse_device(text)


def test_too_many() -> None:
    with pytest.raises(MoeplanError, match=f"at most {MAX_CLUSTER_DEVICES:,}"):
        made("fast:3000x8")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("devices: []", "devices"),
        ("devices: [{gpu: fast, gpus: 8, colour: 1}]", "colour"),
        ("devices: [{gpu: fast}]", "gpus"),
        ("devices: [{gpu: fast, gpus: eight}]", "gpus"),
        ("- 1", "document"),
        ("devices: {1: 2}", "devices"),
    ],
)
def test_a_wrong_description_names_the_field(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "d.yaml").write_text(text)
    with pytest.raises(MoeplanError, match=said):
        read_described(tmp_path / "d.yaml")


@pytest.mark.parametrize(
    ("more", "said"),
    [("memory: 81GiB", "80.0 GiB"), ("switches: 3", "3 switches"), ("nic_rate: fast", "nic_rate")],
)
def test_a_description_that_cannot_be(tmp_path: Path, more: str, said: str) -> None:
    (tmp_path / "d.yaml").write_text(f"devices: [{{gpu: fast, gpus: 8, {more}}}]")
    with pytest.raises(MoeplanError, match=said):
        cluster_of(read_described(tmp_path / "d.yaml"), sheet, "t", "c")


@pytest.mark.parametrize(
    ("text", "rate"), [("50GB/s", 5e10), ("400Gb/s", 5e10), ("400 Gbit/s", 5e10), ("1GiB/s", 2**30)]
)
def test_rates(text: str, rate: float) -> None:
    assert parse_rate(text, "x") == pytest.approx(rate)


@pytest.mark.parametrize("text", ["50", "50GB", "0GB/s", "-1GB/s", "1e3GB/s", "50 gb/s"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(MoeplanError, match="such as 50GB/s"):
        parse_rate(text, "x")


def test_durations() -> None:
    assert [parse_seconds(t, "x") for t in ("500ms", "2s", "30us", "1.5min", "5m")] == pytest.approx(
        [0.5, 2.0, 3e-5, 90.0, 300.0]
    )
    for text in ("5", "0ms", "-1s", "1w", "400d"):
        with pytest.raises(MoeplanError, match="such as 500ms"):
            parse_seconds(text, "x")


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["cluster", *arguments])
    return (
        (2, str(result.exception)) if isinstance(result.exception, MoeplanError) else (result.exit_code, result.output)
    )


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = str(tmp_path / "c.json")
    code, _ = run("--device", "h100_sxm:2x8", "--device", "l40s:1x8", "--between", "50GB/s", "-o", path)
    assert code == 0
    assert [kind.name for kind in Cluster.read(path).kinds] == ["h100_sxm", "l40s"]
    code, printed = run("--device", "h100_sxm:1x8", "-o", path, "--json")
    assert json.loads(printed)["kinds"][0]["tabled"]["system"] == "h100_sxm"
    code, said = run("--device", "h100_sxn:1x8", "-o", path)
    assert (code, "h100_sxm" in said) == (2, True)
    assert run("-o", path) == (2, "name either a description (FILE.yaml) or GPUs (--device KIND:HOSTSxGPUS)")


def test_the_template_is_a_description(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "hosts.yaml"
    assert run("--template", str(path))[0] == 0
    assert path.read_text() == TEMPLATE
    assert run(str(path), "-o", str(tmp_path / "c.json"))[0] == 0
    assert len(Cluster.read(tmp_path / "c.json").devices) == 24


def test_a_description_that_was_filled_in_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "hosts.yaml"
    assert [run("--template", str(path))[0] for _ in range(2)] == [0, 0]
    path.write_text(TEMPLATE.replace("l40s", "a30"))
    code, said = run("--template", str(path))
    assert (code, "give another name" in said) == (2, True)
    assert "a30" in path.read_text()


def test_without_measurements_the_workload_that_goes_is_named() -> None:
    with pytest.raises(MissingCurveError, match="--workload serve:"):
        made("fast:1x2").kinds[0].operator("gate", {}, "bf16", "m")

"""Loads of served models, by text and from logs."""

import json
from pathlib import Path

import pytest

from moeplan.spec.errors import MoeplanError
from moeplan.spec.serving_load import is_serving, parse_load


def test_text_forms() -> None:
    load = parse_load("serve:isl=1024,osl=512,concurrency=64")
    assert (load.isl, load.osl, load.concurrency, load.rate, load.most_tokens) == (1024, 512, 64, None, 1536)
    assert str(load) == "serve:isl=1024,osl=512,concurrency=64"
    assert parse_load("serve:osl=5, isl=7,rate=2.5").rate == 2.5
    assert is_serving("serve:isl=1,osl=1")
    assert not is_serving("prefill:512")


@pytest.mark.parametrize(
    "text",
    [
        "serve:",
        "serve:isl=1",
        "serve:isl=0,osl=1",
        "serve:isl=1,osl=1,concurrency=0",
        "serve:isl=1,osl=1,concurrency=4,rate=1",
        "serve:isl=1,isl=2,osl=1",
        "serve:isl=1.5,osl=1",
        "serve:isl=99999999999,osl=1",
        "serve:isl=999999999,osl=1",
        "serve:isl=1,osl=1,colour=2",
    ],
)
def test_a_wrong_text_is_one_line(text: str) -> None:
    with pytest.raises(MoeplanError, match="workload") as error:
        parse_load(text)
    assert "\n" not in str(error.value)


ROWS = [
    {"isl": 100, "osl": 20, "arrival": 0.0},
    {"isl": 300, "osl": 40, "arrival": 4.0},
    {"isl": 200, "osl": 30, "arrival": 1.0},
]


def test_logs_of_both_kinds_say_the_same(tmp_path: Path) -> None:
    lines = ["isl,osl,arrival", *(f"{r['isl']},{r['osl']},{r['arrival']}" for r in ROWS)]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    loads = [parse_load(f"serve:{tmp_path}/log.{kind}") for kind in ("csv", "jsonl")]
    assert loads[0] == loads[1].model_copy(update={"source": loads[0].source})
    assert (loads[0].isl, loads[0].osl, loads[0].longest, loads[0].requests) == (200, 30, 340, 3)
    assert loads[0].rate == pytest.approx(2 / 4)


def test_a_log_without_arrivals_has_no_rate(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("osl,isl\n5,10\n7,10\n")
    load = parse_load(f"serve:{tmp_path}/log.csv")
    assert (load.rate, load.isl, load.osl) == (None, 10, 6)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "", "header"),
        ("a.csv", "isl,osl\n", "no requests"),
        ("a.csv", "input,osl\n1,2\n", "header"),
        ("a.csv", "isl,osl\n1,x\n", "line 2: osl"),
        ("a.csv", "isl,osl\n-1,2\n", "line 2: isl"),
        ("a.csv", "isl,osl,arrival\n1,2,3\n1,2,\n", "1 of 2 requests have an arrival"),
        ("a.csv", "isl,osl,arrival\n1,2,nan\n", "arrival"),
        ("a.jsonl", "[1]\n", "line 1"),
        ("a.jsonl", '{"isl": 1}\n', "osl"),
        ("a.jsonl", '{"isl": 1, "osl": true}\n', "osl"),
        ("a.jsonl", "{\n", "line 1"),
    ],
)
def test_a_wrong_log_names_line_and_field(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(MoeplanError, match=said):
        parse_load(f"serve:{tmp_path / name}")


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MoeplanError, match="no such file"):
        parse_load(f"serve:{tmp_path}/none.csv")

"""The documents: what is written is read back, and whatever else is in the file is refused in one line."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.spec import Model, MoeplanError, Plan, Workload
from moeplan.spec.catalogue import catalogue
from moeplan.spec.document import Document
from moeplan.spec.errors import DocumentError
from moeplan.tests.documents import BODIES, changed, complaint, documents, leaves, plan_body, refused, text

# Round trips


@documents
def test_round_trip(document: type[Document], tmp_path: Path) -> None:
    original = document.model_validate(BODIES[document]())
    path = original.write(tmp_path / "new" / "folder" / "d.json")
    again = document.read(path)
    assert again == original
    assert again.digest() == original.digest()
    assert json.loads(path.read_text())["kind"] == document.kind
    assert [p.name for p in path.parent.iterdir()] == ["d.json"]


def test_every_catalogue_model_round_trips() -> None:
    for model in catalogue().values():
        assert Model.parse(model.to_json(), "m") == model


@documents
def test_digest_follows_the_content(document: type[Document]) -> None:
    """The digest tells any two contents apart, and is the same whatever the order of the fields in the file."""
    body = BODIES[document]()
    shuffled = dict(reversed(body.items()))
    assert document.parse(text(document, shuffled), "d").digest() == document.model_validate(body).digest()


def test_digest_is_the_same_on_every_machine() -> None:
    content = '{"context": 2048, "phase": "decode", "sequences": 32, "tokens": 32}'
    assert Workload.from_text("decode:32@2048").digest() == hashlib.sha256(content.encode()).hexdigest()[:16]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["prefill", "decode"]), st.integers(1, 5000), st.integers(1, 300), st.integers(0, 10**6))
def test_workload_text_round_trips(phase: str, count: int, length: int, context: int) -> None:
    written = f"prefill:{count * length}@{length}" if phase == "prefill" else f"decode:{count}@{context}"
    workload = Workload.from_text(written)
    assert Workload.from_text(str(workload)) == workload
    assert Workload.parse(workload.to_json(), "w") == workload
    assert workload.length == (length if phase == "prefill" else 1)


MALFORMED = (
    "train:5 prefill prefill:0 decode:0 prefill:5@0 prefill:10@3 decode:-1 decode:1e3 prefill:99999999 decode:3@"
)


@pytest.mark.parametrize("written", ["", "prefill:512@512 extra", *MALFORMED.split()])
def test_malformed_workload_texts(written: str) -> None:
    with pytest.raises(MoeplanError, match="workload") as caught:
        Workload.from_text(written)
    assert "\n" not in str(caught.value)


# Malformed content of every document


@documents
@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "3", '"text"', "[" * 200_000, '{"a":' * 50_000, "\ufeff{}", "{'kind': 1}", "1" * 5000],
)
def test_not_a_document(document: type[Document], content: str) -> None:
    refused(document, content)


@documents
def test_kind_and_version(document: type[Document]) -> None:
    body = BODIES[document]()
    assert "kind: expected" in refused(document, json.dumps(body))
    assert "kind: expected" in refused(document, json.dumps({"kind": "x" * 10**6, "version": 1, **body}))
    read = " and ".join(map(str, (*document.earlier, document.version)))
    for version in (document.version + 1, 0, True, "1", 1.0, None):
        assert f"version: this moeplan reads {read}, got {version!r}" in refused(
            document, json.dumps({"kind": document.kind, "version": version, **body})
        )
    assert "version" in refused(document, json.dumps({"kind": document.kind, **body}))


HOSTILE = [float("nan"), float("inf"), -1, 10**400, "x\n\x1b[31m", [], {}, [[[[]]]], True, 1.5, None]


@documents
@pytest.mark.parametrize("value", HOSTILE, ids=lambda v: repr(v)[:12])
def test_hostile_values_anywhere(document: type[Document], value: Any) -> None:
    """Any value in any place is either valid, then it round-trips, or refused in one line that names the place."""
    body = BODIES[document]()
    for path in leaves(body):
        content = text(document, changed(body, path, value))
        try:
            parsed = document.parse(content, "file.json")
        except DocumentError as error:
            message = str(error)
            assert message.startswith("file.json: ")
            assert message.isprintable()
            assert len(message) < 1000
        else:
            assert document.parse(parsed.to_json(), "again") == parsed


@documents
def test_numbers_are_not_guessed_from_text(document: type[Document]) -> None:
    body = BODIES[document]()
    for path in leaves(body):
        place: Any = body
        for step in path:
            place = place[step]
        if isinstance(place, int | float) and not isinstance(place, bool) and "shape" not in path:
            assert "file.json: " in refused(document, text(document, changed(body, path, str(place))))


@documents
def test_missing_and_unknown_fields_are_named(document: type[Document]) -> None:
    body = BODIES[document]()
    required = document.json_schema()["required"][2:]
    for name in required:
        assert f"{name}: Field required" in refused(
            document, text(document, {k: v for k, v in body.items() if k != name})
        )
    assert "surprise: Extra inputs" in refused(document, text(document, body | {"surprise": 1}))
    refused(document, text(document, body | {"new\nline" * 1000: 1}))


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("levels", [50, 190, 500, 900])
def test_deep_values(levels: int) -> None:
    refused(Workload, text(Workload, BODIES[Workload]() | {"tokens": deep(levels)}))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_files(data: st.DataObject) -> None:
    """A document with some bytes cut out or replaced is refused or still a document."""
    content = text(Plan, plan_body())
    at, length = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 40))
    damaged = content[:at] + data.draw(st.text(max_size=5)) + content[at + length :]
    assert complaint(lambda: Plan.parse(damaged, "file.json")).isprintable()

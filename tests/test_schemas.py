"""The published JSON Schemas."""

import json
from pathlib import Path

import numpy as np

from moeplan.spec import Trace
from moeplan.spec.document import Document
from moeplan.spec.schemas import schemas, write_schemas
from moeplan.tests.documents import BODIES, arrays, documents

ROOT = Path(__file__).parents[1]


def test_published_schemas_are_current(tmp_path: Path) -> None:
    """Renew them with `python -c "from moeplan.spec.schemas import write_schemas; write_schemas('docs/schemas')"`."""
    write_schemas(tmp_path)
    published = {path.name: path.read_text() for path in (ROOT / "docs" / "schemas").iterdir()}
    assert published == {path.name: path.read_text() for path in tmp_path.iterdir()}


@documents
def test_schema_names_every_written_field(document: type[Document]) -> None:
    schema = schemas()[f"{document.__name__.lower()}.schema.json"]
    written = json.loads(document.model_validate(BODIES[document]()).to_json())
    assert set(schema["properties"]) == set(written)
    assert schema["properties"]["kind"] == {"const": document.kind}
    assert schema["properties"]["version"] == {"const": document.version}
    assert {"kind", "version"} <= set(schema["required"]) <= set(written)
    assert schema["additionalProperties"] is False


def test_trace_schema_names_every_written_array(tmp_path: Path) -> None:
    described = schemas()["trace.json"]["arrays"]
    fields = arrays()
    full = Trace.of(fields["expert_ids"], 5, zero_experts=2, model="m").write(tmp_path / "a.npz")
    counts = Trace.of_counts(np.ones((2, 3))).write(tmp_path / "b.npz")
    with np.load(full, allow_pickle=False) as a, np.load(counts, allow_pickle=False) as b:
        assert set(a.files) | set(b.files) == set(described)
        for name in a.files:
            assert a[name].ndim == len(described[name]["shape"])

"""Requests made of the service's own schema: every answer is one that the schema names."""

from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")
from moeplan.tests import generated_requests
from moeplan.tests.mutated_documents import send_mutated
from moeplan.tests.services import threaded


def test_every_answer_is_one_that_the_schema_names(tmp_path: Path) -> None:
    with threaded(tmp_path / "jobs") as url:
        answers = generated_requests.run(url, 20)
    assert sum(answers.values()) > 200
    assert not [name for name in answers if name.endswith(("500", "502"))]
    assert {name.rpartition(" ")[2] for name in answers} >= {"200", "404", "422"}


def test_wrong_documents_are_refused_in_one_line(tmp_path: Path) -> None:
    with threaded(tmp_path / "jobs") as url:
        found = send_mutated(url, 150, seed=3)
    assert found[422] > 50

"""Requests that schemathesis makes of the service's own OpenAPI schema, right ones and wrong ones, and what it checks.

Every answer must be one that the schema has: no status that is not named, no body of another form, no server error.
"""

from collections import Counter
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance

UNASKED = [positive_data_acceptance]  # a schema cannot say which bytes are a trace, or which digests are there


def run(url: str, each: int, digest: str = "") -> Counter[str]:
    """Answers by operation and status of about ``each`` requests to every operation; an error where one is wrong.

    digest: of a trace that is there, which replaces half of those that are made up.
    """
    schema = schemathesis.openapi.from_url(f"{url}/v1/openapi.json")
    answers: Counter[str] = Counter()
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        _ask(found.ok(), each, digest, answers)
    return answers


def _ask(operation: Any, each: int, digest: str, answers: Counter[str]) -> None:
    @given(case=operation.as_strategy())
    @settings(
        max_examples=each,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        if digest and isinstance(case.body, dict) and "trace" in case.body and answers.total() % 2:
            case.body |= {"trace": digest, "time_limit": 1}
        answer = case.call_and_validate(excluded_checks=UNASKED, timeout=60)
        answers[f"{operation.method.upper()} {operation.path} {answer.status_code}"] += 1

    ask()

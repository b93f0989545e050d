"""Every family that the reader accepts, counted in the modules that Transformers builds for it: no difference."""

import pytest

from moeplan.benchmarks.families import SMALL, Sizes, published_cases, small_case
from moeplan.spec.catalogue import catalogue
from moeplan.spec.catalogue.huggingface import READERS
from moeplan.spec.catalogue.published import PUBLISHED


@pytest.mark.parametrize("name", SMALL)
def test_small_configurations(name: str) -> None:
    """Unequal dimensions; the cache is that of a forward pass, too."""
    case = small_case(name, *SMALL[name])
    assert case.ours == case.theirs


def test_published_configurations() -> None:
    """All but the Switch models with so many experts, each a module, that they take as long as the others together."""
    names = {name for name in PUBLISHED if not name.startswith("switch-base")} | {"switch-base-8"}
    cases = list(published_cases(sorted(names)))
    assert {case.name: case.ours for case in cases} == {case.name: case.theirs for case in cases}
    assert all(case.ours == Sizes.of(catalogue()[case.name]) for case in cases)  # what `moeplan models` shows


def test_every_family_is_among_them() -> None:
    assert {family for family, _ in SMALL.values()} == set(READERS)

"""Transformers, of a version whose experts modules have the form that this package knows."""

import re
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from ...spec.errors import MoeplanError

OLDEST, NEWEST = (5, 20), (5, 23)


def transformers_package() -> ModuleType:
    """Raises MoeplanError where it is missing, or of a version that was not tested."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise MoeplanError("moeplan.transformers needs Transformers: pip install 'moeplan[hf]'") from None
    check_version(found)
    import transformers.integrations.moe

    return transformers


def check_version(found: str) -> None:
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        oldest, newest = (".".join(map(str, pair)) for pair in (OLDEST, NEWEST))
        raise MoeplanError(
            f"Transformers {found}: moeplan.transformers knows the experts of versions {oldest} to {newest}: "
            f"pip install 'transformers>={oldest},<{NEWEST[0]}.{NEWEST[1] + 1}'"
        )

"""Which tests run alone: a file that is renamed must not lose its place."""

from pathlib import Path

from moeplan.tests.conftest import ALONE, LONG


def test_files_that_are_named_exist() -> None:
    folder = Path(__file__).parent
    assert [name for name in (*sorted(ALONE), *LONG) if not (folder / f"{name}.py").is_file()] == []
    assert not ALONE & set(LONG)

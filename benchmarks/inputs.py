"""How a table names its inputs."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = "([inputs](../../docs/inputs.md))"  # where traces that are not in the repository come from


def named(path: Path) -> str:
    """A file of the repository by its place in it, another as it was given."""
    full = path.resolve()
    return full.relative_to(ROOT).as_posix() if full.is_relative_to(ROOT) else str(path)

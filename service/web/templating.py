"""Templates of the page and of reports: one environment, which escapes everything that comes out of a document."""

from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment

STATIC = Path(str(files(__package__))) / "static"
PLOTLY = "plotly.min.js"


@cache
def environment() -> "Environment":
    """Where the templates are. ``check_service(*DRAWN)`` says before whether Jinja is there."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader(__package__, "templates")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def plotly_file() -> Path:
    """Plotly's script, in the package of that name, which is not imported: that takes seconds."""
    found = find_spec("plotly")
    assert found is not None
    folders = found.submodule_search_locations or ()
    return next(path for folder in folders if (path := Path(folder) / "package_data" / PLOTLY).is_file())


def static_text(name: str) -> str:
    """A file of ours for browsers."""
    return (STATIC / name).read_text(encoding="utf-8")

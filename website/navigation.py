"""The navigation of the site, with folders filled in, so that no page is lost."""

from collections.abc import Iterable
from typing import Any


def filled(nav: list[Any], found: Iterable[str]) -> list[Any]:
    """``nav``, as MkDocs takes it: pages, or {title: page or list}.

    A page that ends in ``/`` is a folder: it becomes all of ``found`` in it that no entry names. What then is nowhere
    stands under *More*, at the end.
    """
    pages = sorted(found, key=_order)
    named = {page for page in _pages(nav) if not page.endswith("/")}
    taken: set[str] = set()

    def inside(folder: str) -> list[str]:
        new = [page for page in pages if page.startswith(folder) and page not in named | taken]
        taken.update(new)
        return new

    def fill(entry: Any) -> list[Any]:
        if isinstance(entry, str):
            return inside(entry) if entry.endswith("/") else [entry]
        return [{title: fill_section(value) for title, value in entry.items()}]

    def fill_section(value: Any) -> Any:
        if isinstance(value, str):
            return inside(value) if value.endswith("/") else value
        return [new for entry in value for new in fill(entry)]

    result = [new for entry in nav for new in fill(entry)]
    left = [page for page in pages if page not in named | taken]
    return [*result, {"More": left}] if left else result


def _order(page: str) -> tuple[str, bool, str]:
    """By folder, its own page first."""
    folder, _, name = page.rpartition("/")
    return folder, name not in ("index.md", "README.md"), name


def _pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in _pages(entry)]

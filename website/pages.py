"""Which file of the repository is which page of the site, and where links between them lead.

README.md               index.md
docs/X                  X
benchmarks/results/X    results/X
CHANGELOG.md            changelog.md      (CONTRIBUTING.md alike)
examples/**/README.md   the same, pictures beside it too
any other file          files/PATH.md: its text on a page, where some page links to it
a folder                its README.md, else files/PATH/index.md: the text of its files
"""

from contextlib import suppress
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from urllib.parse import unquote, urlsplit

from .markdown import links

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/**/*.md",
    "benchmarks/results/*.md",
    "examples/**/*.md",
)
SCHEMAS = "docs/schemas"
LANGUAGES = {".py": "python", ".sh": "sh", ".yaml": "yaml", ".json": "json", ".toml": "toml"}
PICTURES = (".png", ".svg")


class LinkError(ValueError):
    """A link that leads nowhere: what is wrong with it."""


def documents(root: Path = ROOT) -> list[str]:
    """Every document that people read, by its path in the repository."""
    return [path.relative_to(root).as_posix() for pattern in DOCUMENTS for path in sorted(root.glob(pattern))]


def is_relative(target: str) -> bool:
    """Whether a link leads to a place in this repository."""
    parts = urlsplit(target)
    return not (parts.scheme or parts.netloc)


def resolve(document: str, target: str, root: Path = ROOT) -> tuple[str, str]:
    """File or folder of the repository and anchor that a relative link in ``document`` leads to; raises LinkError."""
    parts = urlsplit(target)
    if parts.path.startswith("/"):
        raise LinkError(f"{target}: from the root of a site, not of the repository")
    path = normpath(str(PurePosixPath(document).parent / unquote(parts.path))) if parts.path else document
    if path.startswith(".."):
        raise LinkError(f"{target}: outside the repository")
    if not (root / path).exists():
        raise LinkError(f"{target}: no file or folder {path}")
    return path, unquote(parts.fragment)


def page_of(path: str, root: Path = ROOT) -> str:
    """The page, or the picture, that shows a file or folder of the repository."""
    if path == SCHEMAS:
        return "reference/schemas.md"
    if (root / path).is_dir():
        readme = str(PurePosixPath(path) / "README.md")
        return page_of(readme, root) if (root / readme).exists() else f"files/{path}/index.md"
    if path == "README.md":
        return "index.md"
    for folder, place in (("docs/", ""), ("benchmarks/results/", "results/")):
        if path.startswith(folder):
            return place + path.removeprefix(folder)
    if path in ("CHANGELOG.md", "CONTRIBUTING.md"):
        return path.lower()
    if path.startswith("examples/") and path.endswith((".md", *PICTURES)):
        return path
    return f"files/{path}.md" if is_text(root / path) else f"files/{path}"


def relink(document: str, target: str, root: Path = ROOT) -> str:
    """A link of ``document`` as it must be on its page."""
    if not is_relative(target) or target.startswith("#"):
        return target
    path, anchor = resolve(document, target, root)
    page = relpath(page_of(path, root), str(PurePosixPath(page_of(document, root)).parent))
    return f"{page}#{anchor}" if anchor else page


def linked(root: Path = ROOT) -> set[str]:
    """Files and folders of the repository that some document links to; broken links are for others to report."""
    found = set()
    for document in documents(root):
        for link in links((root / document).read_text()):
            if is_relative(link.target):
                with suppress(LinkError):
                    found.add(resolve(document, link.target, root)[0])
    return found


def is_text(path: Path) -> bool:
    return path.is_file() and path.suffix in (*LANGUAGES, ".md", ".txt", ".cff")


def source_page(path: str, root: Path = ROOT) -> str:
    """A page with the text of a file, or of all files of a folder."""
    place = root / path
    files = [file for file in sorted(place.rglob("*")) if is_text(file)] if place.is_dir() else [place]
    parts = [f"# {path}"]
    for file in files:
        if place.is_dir():
            parts.append(f"## {file.relative_to(place)}")
        text = file.read_text().rstrip()
        fence = "~~~~" if "~~~" in text else "~~~"
        parts.append(f"{fence}{LANGUAGES.get(file.suffix, 'text')}\n{text}\n{fence}")
    return "\n\n".join(parts) + "\n"

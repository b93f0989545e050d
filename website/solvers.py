"""Pages of the solvers, from their docstrings, each of which opens with its formulation."""

import ast
from pathlib import Path

from .pages import ROOT

FOLDER = "solvers"


def solver_pages(root: Path = ROOT) -> dict[str, str]:
    """Page -> its text: ``solvers/index.md``, and one for each folder of solvers."""
    top = root / FOLDER
    pages = {}
    for folder in sorted(path for path in top.iterdir() if (path / "__init__.py").exists()):
        pages[f"{FOLDER}/{folder.name}.md"] = _page(folder, sorted(folder.glob("*.py")))
    pages[f"{FOLDER}/index.md"] = _page(top, sorted(top.glob("*.py")))
    return pages


def _page(folder: Path, files: list[Path]) -> str:
    opening = marked(docstring(folder / "__init__.py"))
    parts = [f"# {folder.name.capitalize()}", opening]
    for file in files:
        if file.name != "__init__.py" and (text := marked(docstring(file))):
            first, _, rest = text.partition("\n")
            parts += [f"## {file.stem}", f"*`{file.relative_to(folder.parent).as_posix()}`*: {first}", rest.strip("\n")]
    return "\n\n".join(part for part in parts if part) + "\n"


def docstring(path: Path) -> str:
    """The docstring of a file."""
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def marked(text: str) -> str:
    """A docstring as Markdown, which it nearly is: formulas are blocks of code, where backticks are no marks, and
    ``][`` elsewhere would be taken for a link.
    """
    lines = []
    for line in text.splitlines():
        if line.startswith("    "):
            line = line.replace("``", "")
        else:
            parts = line.split("``")
            parts[::2] = [part.replace("][", "]\\[") for part in parts[::2]]
            line = "``".join(parts)
        lines.append(line)
    return "\n".join(lines)

"""The overview of measured results: which command gave each, on which hardware, when."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from .markdown import first_paragraph, headings
from .pages import ROOT

FOLDER = "benchmarks/results"
COMMAND = re.compile(r"`((?:python|make|benchmarks/)[^`]*)`|^    (python .*)$", re.M)
HARDWARE = re.compile(r"((?:AMD|Intel|x86|NVIDIA)[^,;`]*(?:, \d+ cores)?)")
DATE = re.compile(r"20\d\d-\d\d-\d\d")


class Result(NamedTuple):
    """What the head of a page of results says; empty where it does not. date: written there, or else of its commit."""

    name: str
    title: str
    command: str
    hardware: str
    date: str


def results(root: Path = ROOT) -> list[Result]:
    """All pages of results, by name."""
    return [_result(path, root) for path in sorted((root / FOLDER).glob("*.md"))]


def _result(path: Path, root: Path) -> Result:
    text = path.read_text()
    head = text.partition("\n## ")[0].partition("\n|")[0]
    command, hardware, date = COMMAND.search(head), HARDWARE.search(first_paragraph(text)), DATE.search(head)
    ran = (command[1] or command[2]).strip() if command else ""
    when = date[0] if date else _committed(path, root)
    return Result(path.stem, headings(text)[0], ran, hardware[1].strip() if hardware else "", when)


def _committed(path: Path, root: Path) -> str:
    """The day of the file's last commit; nothing outside a repository."""
    command = ["git", "log", "-1", "--format=%cs", "--", str(path.relative_to(root))]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return f"committed {done.stdout.strip()}" if done.returncode == 0 and done.stdout.strip() else ""


def titled(root: Path = ROOT) -> dict[str, str]:
    """Page -> its text; several pages have one heading, so that in the navigation each goes by its file's name."""
    texts = {path.stem: path.read_text() for path in sorted((root / FOLDER).glob("*.md"))}
    return {f"results/{name}.md": f"---\ntitle: {name}\n---\n\n{text}" for name, text in texts.items()}


def results_page(root: Path = ROOT) -> str:
    """The overview as a table."""
    lines = ["| page | | command | hardware | date |", "|---|---|---|---|---|"]
    for result in results(root):
        command = f"`{result.command}`" if result.command else ""
        cells = [f"[{result.name}]({result.name}.md)", result.title, command, result.hardware, result.date]
        lines.append(f"| {' | '.join(cells)} |")
    told = "What each command wrote, on which hardware; where a page does not name the day, it is that of its commit."
    return "\n\n".join(["# Results", told, "\n".join(lines)]) + "\n"

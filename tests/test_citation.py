"""CITATION.cff: well formed, of this version, and with every paper that the documents and the sources name."""

import re

import yaml

import moeplan
from moeplan.website.pages import ROOT

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
ARXIV = re.compile(r"(?:arXiv[ :]|\()(\d{4}\.\d{5})\b")
FOLDERS = ("spec", "solvers", "runtime", "profiler", "planner", "service", "benchmarks", "docs")


def test_it_has_what_the_format_demands() -> None:
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION.keys() >= {"message", "title", "authors"}
    assert CITATION["version"] == moeplan.__version__
    assert all(reference.keys() >= {"type", "title", "authors"} for reference in CITATION["references"])


def test_every_paper_that_is_named_is_cited() -> None:
    cited = {reference["identifiers"][0]["value"].removeprefix("arXiv:") for reference in CITATION["references"]}
    assert {reference["url"].rpartition("/")[2] for reference in CITATION["references"]} == cited
    files = [ROOT / "README.md", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    texts = [path.read_text() for path in files if path.suffix in (".md", ".py") and path.is_file()]
    named = {number for text in texts for number in ARXIV.findall(text)}
    assert len(named) >= 6
    assert named <= cited

"""Pages of the site that are made from the sources: complete, and current where they are kept in the repository."""

import json
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

import moeplan
import moeplan.runtime.embedding
from moeplan.service.app import app
from moeplan.tests import test_imports
from moeplan.website import architecture, reference, results, schemas, solvers
from moeplan.website.markdown import fenced
from moeplan.website.navigation import filled
from moeplan.website.offline import loaded_from_elsewhere
from moeplan.website.pages import ROOT, linked, page_of, source_page


def test_the_picture_of_the_packages_is_current() -> None:
    """Renew it with `python -m moeplan.website.architecture`."""
    assert (ROOT / architecture.PICTURE).read_text() == architecture.picture(architecture.imports())


def test_the_picture_shows_every_import_between_packages() -> None:
    """By the other reading of imports, that of the rules."""
    found = set()
    for path in test_imports.FILES:
        package = test_imports.package_of(path)
        for _, name in test_imports.imports(test_imports.ast.parse(path.read_text()), path):
            parts = name.split(".")
            if package in test_imports.PACKAGES and parts[0] == "moeplan" and parts[1] in test_imports.PACKAGES:
                found.add((package, parts[1]))
    assert architecture.imports() == {(a, b) for a, b in found if a != b}
    assert ("planner", "solvers") in found


def test_a_package_stands_above_what_it_imports() -> None:
    with pytest.raises(ValueError, match="change PLACES"):
        architecture.picture({("spec", "planner")})


def commands(group: TyperGroup, name: str) -> list[tuple[str, typer.core.TyperCommand]]:
    """Every command below a group, with its full name."""
    context, found = typer.Context(group), []
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        assert command is not None
        inside = (
            commands(command, f"{name} {word}") if isinstance(command, TyperGroup) else [(f"{name} {word}", command)]
        )
        found += inside
    return found


def test_the_command_line_is_all_there() -> None:
    page = reference.cli_page()
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    found = commands(group, "moeplan")
    assert {"moeplan profile", "moeplan trace import"} <= {name for name, _ in found}
    for name, command in found:
        section = page.split(f" `{name}`\n", 1)[1].partition("\n#")[0]
        for option in command.params:
            is_option = option.param_type_name == "option"
            written = max(option.opts, key=len) if is_option else (option.metavar or option.name or "").upper()
            assert written in (section if is_option else section.upper()), (name, written)


def test_everything_that_can_be_imported_is_in_the_reference() -> None:
    found = [
        line.rpartition(".")[2] for line in reference.python_page().splitlines() if line.startswith("::: moeplan.")
    ]
    assert found[:4] == ["place", "profile", "run", "solve"]
    embedding = set(moeplan.runtime.embedding.__all__)
    assert {*found, "__version__"} - embedding == set(moeplan.__all__)
    assert embedding <= {*found}


def test_every_model_of_the_catalogue_is_in_the_table() -> None:
    page = reference.models_page()
    assert all(f"| `{row['name']}` |" in page for row in reference.catalogue_rows())
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1


def test_every_field_of_every_document_is_in_the_reference() -> None:
    page = schemas.schemas_page()
    for path in (ROOT / "docs" / "schemas").iterdir():
        schema = json.loads(path.read_text())
        section = page.split(f"\n## {schema['title']}\n", 1)[1].partition("\n## ")[0]
        fields = [*schema.get("properties", schema.get("arrays", {}))]
        fields += [name for part in schema.get("$defs", {}).values() for name in part.get("properties", ())]
        assert fields
        assert [name for name in fields if f"\n| `{name}` |" not in section] == []


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ({"type": "integer"}, "integer"),
        ({"$ref": "#/$defs/Model"}, "Model"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "string or null"),
        ({"type": "array", "items": {"type": "array", "items": {"$ref": "#/$defs/A"}}}, "list of list of A"),
        ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]}, "[integer, string]"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "name -> number"),
        ({"enum": ["a", "b"]}, '`"a"`, `"b"`'),
        ({"const": 1}, "`1`"),
        ({}, "any"),
    ],
)
def test_types_as_text(field: dict, text: str) -> None:
    assert schemas.kind_of(field) == text


def test_every_solver_has_its_formulation_on_a_page() -> None:
    pages = solvers.solver_pages()
    text = "\n".join(pages.values()).replace("]\\[", "][").replace("``", "")
    for path in (ROOT / "solvers").rglob("*.py"):
        for line in solvers.docstring(path).splitlines():
            assert line.replace("``", "") in text, path
    assert "    (1) slots:    #{e: d[l, e] = g} <= capacity[g]" in pages["solvers/placement.md"]
    assert "solvers/index.md" in pages


def test_results_name_their_command() -> None:
    found = {result.name: result for result in results.results()}
    assert {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.md")} == set(found)
    assert [result.name for result in found.values() if not result.command] == []
    assert found["kernels"].command == "python benchmarks/kernels.py --budget 0.15"
    assert found["kernels"].hardware == "Intel(R) Xeon(R) Processor, 2 cores"
    assert found["kernels"].date == "2026-11-27"
    page = results.results_page()
    assert all(f"]({name}.md)" in page for name in found)


def test_sources_that_are_linked_are_shown(tmp_path: Path) -> None:
    assert "examples/labs" in linked()
    assert page_of("examples/labs") == "files/examples/labs/index.md"
    page = source_page("examples/labs")
    assert "name: slow-link" in page
    assert "## top8/config.json" in page
    (tmp_path / "a.py").write_text('"""\n~~~\n"""\n')
    assert source_page("a.py", tmp_path) == '# a.py\n\n~~~~python\n"""\n~~~\n"""\n~~~~\n'


def test_folders_of_the_navigation_are_filled_and_nothing_is_lost() -> None:
    nav = ["index.md", {"A": "a/"}, {"B": [{"C": "c/"}, "b.md"]}, {"T": ["t/2.md", "t/"]}]
    found = ["a/y.md", "a/README.md", "a/x.md", "index.md", "b.md", "c/one.md", "t/1.md", "t/2.md", "new.md", "d/e.md"]
    assert filled(nav, found) == [
        "index.md",
        {"A": ["a/README.md", "a/x.md", "a/y.md"]},
        {"B": [{"C": ["c/one.md"]}, "b.md"]},
        {"T": ["t/2.md", "t/1.md"]},
        {"More": ["new.md", "d/e.md"]},
    ]


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ("<script src='https://unpkg.com/a.js'></script>", ["a.html: https://unpkg.com/a.js"]),
        ('<link rel="stylesheet" href="//fonts.example/a.css">', ["a.html: //fonts.example/a.css"]),
        ('<link rel="preconnect" href="https://fonts.example">', ["a.html: https://fonts.example"]),
        ('<img src="https://example.org/a.png">', ["a.html: https://example.org/a.png"]),
        ('<a href="https://example.org">a</a><link rel="canonical" href="https://example.org">', []),
        ('<script src="../a.js"></script><img src="a.png"><link rel="stylesheet" href="/a.css">', []),
    ],
)
def test_what_a_page_loads_from_elsewhere_is_seen(tmp_path: Path, page: str, found: list[str]) -> None:
    (tmp_path / "a.html").write_text(f"<html><head>{page}</head></html>")
    assert loaded_from_elsewhere(tmp_path) == found


def test_a_style_sheet_that_loads_from_elsewhere_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text("a { background: url(a.png) }")
    (tmp_path / "b.css").write_text("a { background: url(https://example.org/a.png) }")
    assert loaded_from_elsewhere(tmp_path) == ["b.css: url(http"]


def test_examples_of_docstrings_become_code() -> None:
    text = "Text.\n\n>>> a = f(  # doctest: +SKIP\n...     1)\n>>> b  # doctest: +SKIP\n\nMore."
    assert fenced(text) == "Text.\n\n```pycon\n>>> a = f(\n...     1)\n>>> b\n```\n\nMore."
    assert fenced("a >>> b") == "a >>> b"

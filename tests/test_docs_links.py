"""Every relative link and anchor of the documents leads somewhere."""

from pathlib import Path

import pytest

from moeplan.website.links import broken_links
from moeplan.website.markdown import anchors, links, slug
from moeplan.website.pages import ROOT, documents, page_of, relink


@pytest.mark.parametrize("document", documents())
def test_links_and_anchors_resolve(document: str) -> None:
    assert broken_links(document) == []


def test_the_documents_are_looked_at() -> None:
    found = documents()
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/choosing.md", "docs/strategies/chunks.md"} < set(
        found
    )
    assert {"benchmarks/results/lab.md", "examples/tiny_moe/README.md"} < set(found)
    assert sum(len(links((ROOT / document).read_text())) for document in found) > 80


@pytest.fixture
def there(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "other.md").write_text("# One\n\n## Two `names`, here\n\n## One\n")
    (tmp_path / "docs" / "a picture.png").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    "text",
    [
        "[a](other.md)",
        "[a](other.md#one) [b](other.md#one-1)",
        "[a](other.md#two-names-here)",
        "# Here it is\n\n[a](#here-it-is)",
        "[a](../docs) [b](.)",
        "![a](a%20picture.png)",
        "[a](https://example.org/missing.md#nothing) [b](mailto:a@example.org)",
        "`[a](missing.md)`\n\n    [a](missing.md)\n\n```text\n[a](missing.md)\n```",
        "[a][b]\n\n[b]: other.md",
    ],
)
def test_good_links_are_not_reported(there: Path, text: str) -> None:
    (there / "docs" / "page.md").write_text(text)
    assert broken_links("docs/page.md", there) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](missing.md)", "docs/page.md:1: missing.md: no file or folder docs/missing.md"),
        ("text\n\n- [a](docs/other.md)", "docs/page.md:3: docs/other.md: no file or folder docs/docs/other.md"),
        ("![a](missing.png)", "no file or folder docs/missing.png"),
        ("<img src='missing.png'>", "no file or folder docs/missing.png"),
        ('see <a href="missing.md">it</a>', "no file or folder docs/missing.md"),
        ("[a][b]\n\n[b]: missing.md", "no file or folder docs/missing.md"),
        ("| a |\n|---|\n| [a](missing.md) |", "no file or folder docs/missing.md"),
        ("[a](../../other.md)", "outside the repository"),
        ("[a](/docs/other.md)", "from the root of a site"),
        ("[a](other.md#three)", "no heading of docs/other.md has this anchor"),
        ("[a](other.md#one-2)", "no heading of docs/other.md has this anchor"),
        ("# Here\n\n[a](#there)", "no heading of docs/page.md has this anchor"),
        ("[a](a%20picture.png#one)", "only headings of documents have anchors"),
    ],
)
def test_a_broken_link_is_named(there: Path, text: str, problem: str) -> None:
    (there / "docs" / "page.md").write_text(text)
    (found,) = broken_links("docs/page.md", there)
    assert problem in found


def test_anchors_are_those_of_github() -> None:
    assert slug("What `solve` does by itself") == "what-solve-does-by-itself"
    assert slug("Devices, links & groups: 1/256") == "devices-links--groups-1256"
    assert anchors("# A\n\nA\n=\n\n## [A](b.md) *b*\n\n```sh\n# no heading\n```\n") == {"a", "a-1", "a-b"}


@pytest.mark.parametrize(
    ("document", "target", "becomes"),
    [
        ("README.md", "docs/clusters.md", "clusters.md"),
        ("README.md", "docs/demo.png", "demo.png"),
        ("README.md", "CHANGELOG.md", "changelog.md"),
        ("docs/choosing.md", "../benchmarks/results/settings.md", "results/settings.md"),
        ("docs/strategies/chunks.md", "../../benchmarks/results/systems.md#chunks", "../results/systems.md#chunks"),
        ("docs/strategies/shortcut.md", "../../examples/shortcut_moe", "../examples/shortcut_moe/README.md"),
        ("docs/choosing.md", "../examples/labs", "files/examples/labs/index.md"),
        ("examples/tiny_moe/README.md", "trace.npz", "../../files/examples/tiny_moe/trace.npz"),
        ("examples/shortcut_moe/README.md", "standard.json", "../../files/examples/shortcut_moe/standard.json.md"),
        ("README.md", "docs/schemas", "reference/schemas.md"),
        ("README.md", "https://example.org/docs", "https://example.org/docs"),
        ("README.md", "#the-loop", "#the-loop"),
    ],
)
def test_links_between_pages_of_the_site(document: str, target: str, becomes: str) -> None:
    assert relink(document, target) == becomes


def test_no_two_documents_share_a_page() -> None:
    pages = [page_of(document) for document in documents()]
    assert len(set(pages)) == len(pages)

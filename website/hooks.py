"""What MkDocs asks while it builds the site (``make docs``): pages from all over the repository, and their links."""

import logging
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from moeplan.website import pages, reference, results, schemas, solvers
from moeplan.website.markdown import slug
from moeplan.website.navigation import filled
from moeplan.website.offline import loaded_from_elsewhere
from moeplan.website.relink import Relink

log = logging.getLogger("mkdocs.moeplan")  # its warnings end a strict build
PACKAGE = pages.ROOT / ".venv" / "package" / "moeplan"  # not in build/: type checkers look for modules there
RELINK = Relink()
DOCUMENT_OF: dict[str, str] = {}  # page -> its document in the repository


def on_startup(**_: Any) -> None:
    """Link the package alone into a folder: the Python reference's reader walks through all that it is given."""
    PACKAGE.mkdir(parents=True, exist_ok=True)
    for path in (*pages.ROOT.glob("*.py"), *(init.parent for init in pages.ROOT.glob("*/__init__.py"))):
        link = PACKAGE / path.name
        if not link.is_symlink():
            link.symlink_to(path)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Headings get GitHub's anchors, so that links hold in both places."""
    extensions: list[Any] = config.markdown_extensions  # names, and also extensions themselves
    extensions.append(RELINK)
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every page that is not in docs/, and put those of folders into the navigation."""
    texts = generated_pages()
    pictures: set[str] = set()
    for document in pages.documents():
        page = pages.page_of(document)
        DOCUMENT_OF[page] = document
        if not document.startswith("docs/"):
            texts.setdefault(page, (pages.ROOT / document).read_text())
    for path in sorted(pages.linked()):
        page = pages.page_of(path)
        if page in texts or files.get_file_from_path(page):
            continue
        if page.endswith(".md"):
            texts[page] = pages.source_page(path)
        else:
            pictures.add(path)
    for page, text in texts.items():
        within = InclusionLevel.NOT_IN_NAV if page.startswith("files/") else InclusionLevel.INCLUDED
        files.append(File.generated(config, page, content=text, inclusion=within))
    for path in pictures:
        files.append(File.generated(config, pages.page_of(path), abs_src_path=str(pages.ROOT / path)))
    found = [file.src_uri for file in files.documentation_pages() if not file.src_uri.startswith("files/")]
    config.nav = filled(config.nav or [], found)
    return files


def generated_pages() -> dict[str, str]:
    """Pages that no document holds as they are."""
    return {
        "models.md": reference.models_page(),
        "reference/cli.md": reference.cli_page(),
        "reference/python.md": reference.python_page(),
        "reference/schemas.md": schemas.schemas_page(),
        "results/index.md": results.results_page(),
        **results.titled(),
        **solvers.solver_pages(),
    }


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    RELINK.document = DOCUMENT_OF.get(page.file.src_uri)
    return markdown


def on_post_build(config: MkDocsConfig) -> None:
    for line in loaded_from_elsewhere(Path(config.site_dir)):
        log.warning("the site must not need the internet: %s", line)

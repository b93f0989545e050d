"""Links between files of the repository become links between pages: an extension of the site's Markdown."""

import logging
from typing import Any
from xml.etree.ElementTree import Element

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor

from .pages import LinkError, relink

log = logging.getLogger("mkdocs.moeplan")  # its warnings end a strict build
BEFORE_MKDOCS = 10  # whose own treeprocessor, of priority 0, then checks every link; the text is read at 20


class Relink(Extension):
    """document: the path in the repository of the page that is rendered; none for a page that is generated."""

    document: str | None = None

    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(_Links(self, md), "relink", BEFORE_MKDOCS)


class _Links(Treeprocessor):
    def __init__(self, extension: Relink, md: Markdown) -> None:
        super().__init__(md)
        self.extension = extension

    def run(self, root: Element) -> Any:
        if document := self.extension.document:
            for element in root.iter():
                for name in ("href", "src"):
                    if target := element.get(name):
                        try:
                            element.set(name, relink(document, target))
                        except LinkError as error:
                            log.warning("%s: %s", document, error)

"""What is wrong with the links of a document."""

from pathlib import Path

from .markdown import anchors, links
from .pages import ROOT, LinkError, is_relative, resolve


def broken_links(document: str, root: Path = ROOT) -> list[str]:
    """One line for every relative link or anchor that leads nowhere; document: its path in the repository."""
    found = []
    for link in links((root / document).read_text()):
        if not is_relative(link.target):
            continue
        try:
            path, anchor = resolve(document, link.target, root)
        except LinkError as error:
            found.append(f"{document}:{link.line}: {error}")
            continue
        if not anchor:
            continue
        if not path.endswith(".md"):
            found.append(f"{document}:{link.line}: {link.target}: only headings of documents have anchors")
        elif anchor not in anchors((root / path).read_text()):
            found.append(f"{document}:{link.line}: {link.target}: no heading of {path} has this anchor")
    return found

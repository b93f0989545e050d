"""Whether a built site can be read without internet: nothing that a browser loads by itself may come from elsewhere."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

LOADED = {
    "script": ("src",),
    "link": ("href",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
}
NOT_LOADED = {
    "canonical",
    "alternate",
    "next",
    "prev",
    "author",
    "license",
}  # these only say something


class _Loads(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and set((given.get("rel") or "").split()) & NOT_LOADED:
            return
        self.found += [value for name in LOADED.get(tag, ()) if (value := given.get(name)) and urlsplit(value).netloc]


def loaded_from_elsewhere(folder: Path) -> list[str]:
    """``page: address`` for everything that some page loads from another host."""
    found = []
    for path in sorted(folder.rglob("*.html")):
        reader = _Loads()
        reader.feed(path.read_text())
        found += [f"{path.relative_to(folder)}: {address}" for address in reader.found]
    for path in sorted(folder.rglob("*.css")):
        text = path.read_text()
        found += [f"{path.relative_to(folder)}: {word}" for word in ("url(http", "url(//", "@import") if word in text]
    return found

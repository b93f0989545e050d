"""Pictures: the kinds that are written, and how."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .document import write_atomically
from .errors import DocumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Each kind's way to leave out when and by what it was made: equal pictures are equal files.
UNDATED = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def picture_kind(path: str | Path) -> str:
    """By the file's ending, png where it has none. Raises DocumentError for a kind that is not written."""
    ending = Path(path).suffix
    kind = ending.removeprefix(".").lower() or "png"
    if kind not in UNDATED:
        raise DocumentError(f"{path}: no picture of kind {ending!r}: use .png, .svg or .pdf")
    return kind


def is_picture(path: str | Path) -> bool:
    """Whether a file's ending says that it is to be a picture."""
    return Path(path).suffix.lower().removeprefix(".") in UNDATED


def plain(text: str) -> str:
    """A text for Matplotlib to draw as it is: a name between dollar signs is no formula."""
    return "".join(c if c.isprintable() else "?" for c in text).replace("$", r"\$")


def save_picture(figure: "Figure", path: str | Path) -> Path:
    """Write it whole or not at all. Raises DocumentError for a kind that is not written, or a path that cannot be."""
    from matplotlib import rc_context

    kind = picture_kind(path)
    # Without the salt the names of an SVG's parts are drawn at random; signs that no font has are drawn as boxes.
    with rc_context({"svg.hashsalt": "moeplan"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        return write_atomically(path, lambda f: figure.savefig(f, format=kind, dpi=140, metadata=UNDATED[kind]))

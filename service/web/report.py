"""A report as one file of HTML: it holds its scripts, styles and data, and a policy under which it can load nothing."""

import base64
import hashlib
from collections.abc import Sequence

from ... import __version__
from .content import Section
from .templating import environment, plotly_file, static_text


def report_html(title: str, about: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole file."""
    template = environment().get_template("report.html")
    scripts = [plotly_file().read_text(encoding="utf-8"), static_text("figures.js")]
    style = static_text("style.css")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(map(_hash, scripts))}",
            "style-src 'unsafe-inline'",  # Plotly writes its own; styles run nothing, and can load nothing here
            "img-src data: blob:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    return template.render(
        title=title,
        about=about,
        sections=sections,
        scripts=scripts,
        style=style,
        policy=policy,
        version=__version__,
    )


def _hash(text: str) -> str:
    """How a policy names an element's text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

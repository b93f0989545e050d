"""The Python reference: docstrings as they are read from the sources."""

from typing import Any

from griffe import Extension, Object

from moeplan.website.markdown import fenced


class Examples(Extension):
    """Examples of docstrings become blocks of code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)

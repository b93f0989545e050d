"""What documents say that a machine can check: links, headings, and blocks of commands.

Read with a CommonMark parser: what only looks like a link or a block, inside code, is none.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

PARSER = MarkdownIt("commonmark").enable("table")
COMMENT = re.compile(r"<!--\s*(.*?)\s*-->", re.S)
EXAMPLE = re.compile(r"(?:^ *>>> .*\n?(?:^ *(?:\.\.\.|>>>).*\n?)*)+", re.M)
HTML_TARGET = re.compile(r"""\b(?:href|src)\s*=\s*["']([^"']*)["']""")


class Link(NamedTuple):
    """line: the first of the paragraph that it stands in, from 1; target: as written."""

    line: int
    target: str


class Block(NamedTuple):
    """A block of code.

    line: its first, from 1; info: what follows the opening fence, ``indented`` without one; comments: the HTML comments
    that stand directly before it.
    """

    line: int
    info: str
    text: str
    comments: tuple[str, ...]


def links(text: str) -> list[Link]:
    """All links and pictures, also those in HTML."""
    found = []
    for token in PARSER.parse(text):
        line = token.map[0] + 1 if token.map else 0
        for part in (token, *(token.children or [])):
            if part.type in ("html_block", "html_inline"):
                found += [Link(line, target) for target in HTML_TARGET.findall(part.content)]
            target = part.attrGet("href") if part.type == "link_open" else part.attrGet("src")
            if isinstance(target, str) and part.type in ("link_open", "image"):
                found.append(Link(line, target))
    return found


def slug(heading: str, separator: str = "-") -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def anchors(text: str) -> set[str]:
    """Anchors of all headings; of equal ones the second ends in ``-1``."""
    found: set[str] = set()
    for heading in headings(text):
        plain, number = slug(heading), 0
        anchor = plain
        while anchor in found:
            number += 1
            anchor = f"{plain}-{number}"
        found.add(anchor)
    return found


def headings(text: str) -> list[str]:
    """The text of all headings, without marks."""
    tokens = PARSER.parse(text)
    return [_words(tokens[i + 1]) for i, token in enumerate(tokens) if token.type == "heading_open"]


def first_paragraph(text: str) -> str:
    """The text of the first paragraph, code in backticks, or nothing."""
    for i, token in enumerate(tokens := PARSER.parse(text)):
        if token.type == "paragraph_open":
            return " ".join(tokens[i + 1].content.split())
    return ""


def blocks(text: str) -> Iterator[Block]:
    """All blocks of code, in order."""
    comments: list[str] = []
    for token in PARSER.parse(text):
        if token.type == "html_block":
            comments += COMMENT.findall(token.content)
            continue
        if token.type in ("fence", "code_block") and token.map:
            info = token.info.strip() if token.type == "fence" else "indented"
            yield Block(token.map[0] + 1, info, token.content, tuple(comments))
        comments = []


def fenced(text: str) -> str:
    """Examples after ``>>>``, which Markdown takes for quotes, in blocks of code, without what only doctest reads."""

    def block(found: re.Match[str]) -> str:
        lines = [line.partition("  # doctest:")[0] for line in found[0].splitlines()]
        return "```pycon\n" + "\n".join(lines) + "\n```\n"

    return EXAMPLE.sub(block, text)


def _words(inline: Token) -> str:
    return "".join(
        " " if part.type in ("softbreak", "hardbreak") else part.content
        for part in inline.children or []
        if part.type in ("text", "code_inline", "softbreak", "hardbreak", "image")
    )

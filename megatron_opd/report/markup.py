"""Tables as Markdown and HTML, in which the characters of a cell stand for themselves."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(markdown_text(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def markdown_text(text: str) -> str:
    """Text without tags, formulas, links, or further cells."""
    return re.sub(r"[\\`*$\[\]|]", r"\\\g<0>", html.escape(" ".join(text.split()), quote=False).replace("-&gt;", "->"))


def html_table(rows: Sequence[Sequence[str]], *, heads: int = 1) -> str:
    """A table in a box of its own that scrolls; the first `heads` cells of a row are its head."""
    head = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(_cell(cell, number < heads) for number, cell in enumerate(row)) + "</tr>" for row in rows[1:])
    return f"<div class=scroll tabindex=0 role=group><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(text: str, is_head: bool) -> str:
    return f"<th scope=row>{html.escape(text)}</th>" if is_head else f"<td>{html.escape(text)}</td>"

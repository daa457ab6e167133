"""Names that users chose, of files and classes: safe in file names, messages, tables, HTML and on the terminal."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

TEXT = {"encoding": "utf-8", "errors": "backslashreplace"}
"""How files are written: file names need not be UTF-8, and must not cause the loss of what has been computed."""
LONGEST = 200
"""Longest file name before its suffix, in bytes: systems allow 255."""


def cell(text: str) -> str:
    """A table cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def markup(text: object) -> str:
    """Text for HTML, attributes included."""
    return html.escape(str(text), quote=True)


def shown(text: object) -> str:
    """Text that any terminal and font can show: unprintable characters are escaped."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(text))


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print `text` verbatim and on one line, however long: brackets are not markup, and no name is broken."""
    console.print(shown(text), style=style, markup=False, highlight=False, soft_wrap=True)


def some(names: Sequence[object], most: int = 3) -> str:
    """The first few of `names`, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def shorten(name: str) -> str:
    """`name`, or as much of its end as a file's name has room for, after a digest of the whole."""
    kept = name
    while len(kept.encode(errors="surrogateescape")) > LONGEST:
        kept = kept[1:]
    return name if kept == name else f"{hashlib.sha256(name.encode(errors='surrogateescape')).hexdigest()[:12]}-{kept}"

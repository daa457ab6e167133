"""Files from elsewhere: one wrapper around all parsers, and directory walks that survive whatever a folder holds."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_REASON = 300
"""Characters of a parser's message that are passed on: some messages repeat the file."""
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class BadFile(ValueError):
    """A file cannot be used; the message names it."""


@contextmanager
def reading(path: Path, kind: type[BadFile] = BadFile, says: str = "cannot be read") -> Iterator[None]:
    """Wraps whatever reads the file `path`, so that every failure becomes one kind of error, which names the file.

    A parser may fail over a damaged file in any way, so no list of its exceptions is ever complete. Only regular files
    are read: reading a FIFO would block forever.

    Raises:
        BadFile: `kind`, in place of every other error except `MemoryError`; a `BadFile` from inside is passed on as it
            is.
    """
    if (why := irregular(path)) is not None:
        raise kind(f"{path}: {says}: {why}")
    try:
        yield
    except (BadFile, MemoryError):
        raise
    except Exception as error:
        raise kind(f"{path}: {says}: {reason(error)}") from error


def irregular(path: Path) -> str | None:
    """Why `path`, with links followed, is not a regular file; None if it is one."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: the name contains a null character
        return reason(error)
    return None if stat.S_ISREG(mode) else f"is {KINDS.get(stat.S_IFMT(mode), 'no file')}; accepted are regular files"


def reason(error: BaseException) -> str:
    """The message of `error`, on one line."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    if not lines:
        return type(error).__name__
    text = lines[-1] if len(lines[-1]) <= LONGEST_REASON else f"{lines[-1][:LONGEST_REASON]}…"
    speaks = isinstance(error, (ValueError, OSError, RuntimeError, EOFError))
    return text if speaks else f"{type(error).__name__}: {text}"


def origin(error: BaseException) -> BaseException:
    """The cause of `error` where one of MONAI's transforms raised it, whose own message only names the transform."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def listed(folder: Path) -> list[Path]:
    """What is in `folder`, by name.

    Raises:
        BadFile: it cannot be listed.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise BadFile(f"{folder}: cannot be listed: {reason(error)}") from error


def walk(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """The files in `folder` and below it, by name, each with why it cannot be opened: None for a regular file.

    Folders that cannot be listed are included with the reason, and so are links to folders, which are not followed:
    they may lead anywhere, even in circles.
    """
    found: list[tuple[Path, str | None]] = []

    def unlisted(error: OSError) -> None:
        found.append((Path(os.fsdecode(error.filename)), reason(error)))

    for parent, folders, files in os.walk(folder, onerror=unlisted):
        links = (name for name in folders if os.path.islink(os.path.join(parent, name)))
        found += [(Path(parent, name), "is a link to a folder, which is not followed") for name in links]
        found += [(path, irregular(path)) for path in (Path(parent, name) for name in files)]
    yield from sorted(found, key=lambda entry: entry[0])

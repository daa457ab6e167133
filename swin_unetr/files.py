"""Files that are whole at any time: written beside their place, flushed to disk, and renamed into it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

GIB = 2**30
"""Bytes; options give sizes in GiB."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` once the context ends without an error.

    It has the modes that the umask gives, whoever reads it. What a process that was killed leaves behind is for
    `remove_leftovers`.

    Raises:
        OSError: the disk is full, say. The file that was at `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what processes that were killed while `replacing` left in `folder`; nobody may be writing there."""
    # Without ".part": names that earlier versions gave to checkpoints they were writing.
    for pattern in (".*.part", ".step-*.pt.*", ".best.pt.*"):
        for path in folder.glob(pattern):
            if path.is_file():
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the new name of a file survive a power failure, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

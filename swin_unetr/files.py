"""Files that are whole at any time: written beside their place, flushed to disk, and renamed into it."""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
        OSError: the disk is full, say; it names `path`. The file that was at `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = None
    try:
        with naming(path, (None, str(temporary))):
            raw = _Raw(temporary, "xb")
            with io.BufferedWriter(raw) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    except RuntimeError as error:
        if raw is None or raw.failed is None:
            raise
        raise OSError(raw.failed.errno, raw.failed.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


class _Raw(io.FileIO):
    """A file that remembers why it could not be written: PyTorch's writer of zip files says something else then.

    Attributes:
        failed: the first error; None where there is none.
    """

    failed: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = self.failed or error
            raise


def replace(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: none takes its place before all of them are written.

    Raises:
        OSError: the disk is full, say; it names the file. All are as they were then.
    """
    with ExitStack() as until_written:
        for path, content in contents.items():
            file = until_written.enter_context(replacing(path))
            file.write(content)
            file.flush()


@contextmanager
def naming(path: Path, instead_of: Container[str | None] | None = None) -> Iterator[None]:
    """An `OSError` of the system within this context names `path`: of a write it names no file at all.

    Args:
        instead_of: names in the place of which it does, None for no name; by default any.
    """
    try:
        yield
    except OSError as error:
        name = None if error.filename is None else os.fsdecode(error.filename)
        if error.errno is None or not (instead_of is None or name in instead_of):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


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

"""Files that are complete at any time: written under a temporary name, flushed to disk, then renamed."""

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
    """A file to write to, which replaces `path` when the context ends without an error.

    Its mode follows the umask. `remove_leftovers` deletes what a killed process leaves behind.

    Raises:
        OSError: writing failed, for example because the disk is full; the error names `path`, and the file that was
            there is unchanged.
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
    """A file that remembers why a write failed: PyTorch's zip writer reports something else.

    Attributes:
        failed: the first error, or None.
    """

    failed: OSError | None = None

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed = self.failed or error
            raise


def replace(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: none is put in place before all of them are written.

    Raises:
        OSError: writing failed, for example because the disk is full; the error names the file, and all files are
            unchanged.
    """
    with ExitStack() as until_written:
        for path, content in contents.items():
            file = until_written.enter_context(replacing(path))
            file.write(content)
            file.flush()


@contextmanager
def naming(path: Path, instead_of: Container[str | None] | None = None) -> Iterator[None]:
    """Make an `OSError` raised within this context name `path`: one raised by a write names no file.

    Args:
        instead_of: the file names that are replaced by `path`, with None for a missing one; by default all.
    """
    try:
        yield
    except OSError as error:
        name = None if error.filename is None else os.fsdecode(error.filename)
        if error.errno is None or not (instead_of is None or name in instead_of):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_leftovers(folder: Path) -> None:
    """Delete what processes killed while `replacing` left in `folder`; no process may be writing there."""
    # Those without ".part" are names that earlier versions gave to checkpoints being written.
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

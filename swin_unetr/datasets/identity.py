"""The identity of a data set, wherever it is stored: the cases for training and validation, by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from . import archives, datalist
from .options import Data

SAMPLES, EXTENT = 16, 4096


def identify(
    data: Data, labelled: bool, channels: int | None = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, dict[str, str]]:
    """A digest of the files of each case by its name, for ``training`` and ``validation``.

    Two folders with the same files have the same digests. These cover a file's size, both of its ends (the last bytes
    of a gzip file are a checksum of its content) and samples in between, so that large data sets need not be read
    completely.

    Args:
        say: is called when an archive is being unpacked.

    Raises:
        ValueError: as `datalist.read` does, and `archives.datalist_in`.
    """
    if archives.is_archive(data.datalist):
        data = replace(data, datalist=archives.datalist_in(data.datalist, say))
    parts = zip(("training", "validation"), datalist.read(data, labelled, channels), strict=True)
    return {name: {case.name: digest(case.files) for case in cases} for name, cases in parts}


def digest(paths: tuple[Path, ...]) -> str:
    """A digest of the content of these files, wherever they are."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, size - EXTENT) * sample // (SAMPLES - 1))
                digest.update(file.read(EXTENT))
    return digest.hexdigest()[:16]

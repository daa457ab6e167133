"""`export.json`, the record of what was exported: from which weights, by which versions, with which error."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..files import replacing

FORMAT = "swin-unetr export 1"
NAME = "export.json"


def read(out: Path) -> dict[str, Any]:
    """What was exported into the folder `out` earlier, by format.

    Raises:
        ValueError: the record there is not one of ours.
    """
    path = out / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format is {content['format']!r}; accepted is {FORMAT!r}")
        return dict(content["exported"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"out: {path} is not a record of an export: {type(error).__name__}: {error}") from error


def write(out: Path, exported: dict[str, Any]) -> None:
    """Replace the record in the folder `out`."""
    content = {"format": FORMAT, "exported": exported}
    with replacing(out / NAME) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file below `folder`, by its path from there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python, of what every export runs on, and of `packages`."""
    names = ("swin-kernels", "torch", "monai", *packages)
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}

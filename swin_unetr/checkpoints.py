"""Checkpoint files: written whole or not at all, checked when read, found again when the newest is damaged.

A checkpoint is a dictionary of tensors and plain values (numbers, text, None, lists, dictionaries), so that
``torch.load(..., weights_only=True)`` reads it and no code in a file ever runs. Its SHA-256 travels inside.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FORMAT = "swin-unetr checkpoint 1"
_NAME = re.compile(r"^step-(\d+)\.pt$")


class Damaged(ValueError):
    """A file is no checkpoint, or not what was written."""


class NotSaved(OSError):
    """A checkpoint could not be written; what was there before is untouched."""


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path`, replacing what is there only once the new file is safely on disk.

    Args:
        content: tensors and plain values by name; `FORMAT` and the checksum are added.

    Raises:
        NotSaved: the disk is full, say. The file that was at `path` is as it was.
        TypeError: `content` holds something else than tensors and plain values.
    """
    whole = {"format": FORMAT, **content}
    whole["checksum"] = checksum(whole)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            torch.save(whole, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    # RuntimeError: what torch's zip writer makes of a failed write.
    except (OSError, RuntimeError) as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        raise NotSaved(
            f"{path}: cannot be written: {_first_line(error)}; what was there before is untouched"
        ) from error


def read(path: Path) -> dict[str, Any]:
    """The checkpoint in a file, its tensors on the CPU.

    Raises:
        Damaged: the file is truncated, altered, holds code, or is no checkpoint of ours.
        FileNotFoundError: there is no such file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise Damaged(f"{path}: does not load with weights_only=True, that is, without running code from it") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise Damaged(f"{path}: cannot be read: {_first_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise Damaged(f"{path}: is no checkpoint of swin-unetr: format is {found!r}; accepted is {FORMAT!r}")
    if content.pop("checksum", None) != checksum(content):
        raise Damaged(f"{path}: its content is not what was written: the checksum differs")
    return content


def name(step: int) -> str:
    """File name of the checkpoint after `step` steps."""
    return f"step-{step:08d}.pt"


def newest(folder: Path) -> tuple[Path, dict[str, Any], list[Damaged]] | None:
    """The newest checkpoint in `folder` that is whole, its content, and why newer ones were passed over.

    None if there is no checkpoint at all.

    Raises:
        Damaged: there are some, and none is whole.
    """
    damaged: list[Damaged] = []
    for path in reversed(series(folder)):
        try:
            return path, read(path), damaged
        except Damaged as error:
            damaged.append(error)
    if damaged:
        raise Damaged("no checkpoint is whole: " + "; ".join(map(str, damaged)))
    return None


def series(folder: Path) -> list[Path]:
    """The checkpoints in `folder` by `name`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.match(path.name))]
    return [path for _, path in sorted(found)]


def prune(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, and what interrupted writes left behind."""
    for path in series(folder)[:-keep]:
        path.unlink()
    for path in folder.glob(".step-*.pt.*"):
        path.unlink()


def checksum(value: Any) -> str:
    """SHA-256, in hexadecimal, of tensors and plain values.

    Raises:
        TypeError: a value is of another kind.
    """
    digest = hashlib.sha256()
    _feed(digest, value, "content")
    return digest.hexdigest()


def _feed(digest, value: Any, where: str) -> None:
    """Add `value` to `digest` so that different values add different bytes: kind, size, content."""
    if isinstance(value, torch.Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        dense = value.detach().cpu().contiguous()
        digest.update(dense.reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        digest.update(f"dict {len(value)} ".encode())
        for key, item in value.items():
            _feed(digest, key, where)
            _feed(digest, item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)} ".encode())
        for index, item in enumerate(value):
            _feed(digest, item, f"{where}[{index}]")
    # Exactly: torch.load would not read a subclass such as NumPy's float64 or torch's own version text.
    elif value is None or type(value) in (bool, int, float, str):
        text = repr(value).encode()
        digest.update(f"{type(value).__name__} {len(text)} ".encode() + text)
    else:
        raise TypeError(f"{where} is a {type(value).__name__}; accepted are tensors, numbers, text, None, lists, dicts")


def _first_line(error: Exception) -> str:
    """What `error` says, without torch's stack of C++ calls; what it is where it says nothing."""
    says = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return says.strip().partition("\n")[0] or type(error).__name__


def _sync_folder(folder: Path) -> None:
    """Make the new name of a file survive a power failure, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoint files: written whole or not at all, checked when read, found again when the newest is damaged.

A checkpoint is a dictionary of tensors and plain values (numbers, text, None, lists, dictionaries), so that
``torch.load(..., weights_only=True)`` reads it and no code in a file ever runs. Its SHA-256 travels inside.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from . import files

FORMAT = "swin-unetr checkpoint 1"
_NAME = re.compile(r"^step-(\d+)\.pt$")


class Damaged(ValueError):
    """A file is not a checkpoint, or its content is not what was written.

    Attributes:
        path: of the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Saved:
    """What is in a file of `torch.save`.

    Attributes:
        content: tensors, on the CPU, and plain values; in a checkpoint of ours without the checksum, which was
            verified.
        sha256: of the file, in hexadecimal.
    """

    content: Any
    sha256: str


class NotSaved(OSError):
    """A checkpoint could not be written; what was there before is untouched."""


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path`, replacing what is there only once the new file is safely on disk.

    Args:
        content: tensors and plain values by name; `FORMAT` and the checksum are added.

    Raises:
        NotSaved: writing failed, for example because the disk is full. The file that was at `path` is as it was.
        TypeError: `content` holds anything but tensors and plain values.
    """
    whole = {"format": FORMAT, **content}
    whole["checksum"] = checksum(whole)
    try:
        with files.replacing(path) as file:
            torch.save(whole, file)
    # torch's zip writer raises RuntimeError; `replacing` says why a write failed.
    except (OSError, RuntimeError) as error:
        raise NotSaved(
            f"{path}: cannot be written: {_first_line(error)}; what was there before is untouched"
        ) from error


def load(path: Path) -> Saved:
    """What `torch.save` wrote into a file, a checkpoint of ours or not; no code in it runs.

    The file is read once: the bytes that are checked, loaded and hashed are the same.

    Raises:
        Damaged: the file cannot be loaded, or the checksum of a checkpoint of ours differs.
        FileNotFoundError, PermissionError: the file does not exist or may not be read.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise Damaged(path, "cannot be read: it is not a regular file")  # reading a pipe would block
    try:
        data = Path(path).read_bytes()
        _check_members(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise Damaged(
            path,
            "does not load with weights_only=True, that is, without running code from it: it was not written by "
            "torch.save, is damaged, or holds more than tensors",
        ) from error
    # A damaged file is a program for the unpickler, which may fail in any way.
    except Exception as error:
        raise Damaged(path, f"cannot be read: {_first_line(error)}") from error
    if is_ours(content):
        content = _verified(path, content)
    return Saved(content, hashlib.sha256(data).hexdigest())


def _check_members(data: bytes) -> None:
    """Compare the checksums in a zip file with its content, which `torch.load` does not.

    Raises:
        ValueError: one differs.
    """
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return  # written by PyTorch before 1.6
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        for member in file.infolist():
            if member.CRC:  # 0 where torch.serialization.set_crc32_options(False) left them out
                with file.open(member) as content:
                    while content.read(1 << 20):  # raises BadZipFile at the end
                        pass


def read(path: Path) -> Saved:
    """The checkpoint of ours in a file.

    Raises:
        Damaged: the file is truncated, altered, holds code, or is not a checkpoint of ours.
        FileNotFoundError, PermissionError: the file does not exist or may not be read.
    """
    saved = load(path)
    if not is_ours(saved.content):
        found = saved.content.get("format") if isinstance(saved.content, dict) else type(saved.content).__name__
        raise Damaged(path, f"is not a checkpoint of swin-unetr: format is {found!r}; accepted is {FORMAT!r}")
    return saved


def is_ours(content: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether the `content` of a file claims to be a checkpoint of this format."""
    return isinstance(content, Mapping) and str(content.get("format")) == FORMAT


def weights(content: Mapping[str, Any]) -> tuple[Any, bool]:
    """The state dict in a checkpoint of ours that prediction uses, and whether it is the weights' moving average."""
    averaged = content.get("ema") is not None
    return content.get("ema" if averaged else "model"), averaged


def _verified(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The `content` of the file `path` without its checksum.

    Raises:
        Damaged: the checksum does not match the content.
    """
    rest = {name: value for name, value in content.items() if name != "checksum"}
    try:
        whole = content.get("checksum") == checksum(rest)
    # For what is neither tensor nor plain value, or contains itself.
    except Exception as error:
        raise Damaged(path, f"its content is not what was written: {_first_line(error)}") from error
    if not whole:
        raise Damaged(path, "its content is not what was written: the checksum differs")
    return rest


def name(step: int) -> str:
    """File name of the checkpoint after `step` steps."""
    return f"step-{step:08d}.pt"


def newest(
    folder: Path, lacks: Callable[[Mapping[str, Any]], str] = lambda content: ""
) -> tuple[Path, dict[str, Any], list[Damaged]] | None:
    """The newest checkpoint in `folder` that is whole, its content, and why newer ones were passed over.

    None if there is no checkpoint at all.

    Args:
        lacks: says what a checkpoint lacks to be whole; "" if nothing.

    Raises:
        Damaged: there are some, and none is whole.
    """
    damaged: list[Damaged] = []
    for path in reversed(series(folder)):
        try:
            content = read(path).content
            if says := lacks(content):
                raise Damaged(path, says)
        except Damaged as error:
            damaged.append(error)
        except FileNotFoundError:
            damaged.append(Damaged(path, "is a link to nowhere"))
        else:
            return path, content, damaged
    if damaged:
        raise Damaged(folder, "no checkpoint is whole: " + "; ".join(map(str, damaged)))
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
    files.remove_leftovers(folder)


def checksum(value: Any) -> str:
    """SHA-256, in hexadecimal, of tensors and plain values.

    Raises:
        TypeError: a value is of any other type.
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
    """The message of `error` without torch's C++ stack; its type where it has no message."""
    says = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return says.strip().partition("\n")[0] or type(error).__name__

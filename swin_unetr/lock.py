"""One owner for a folder of results: two trainings in one folder would delete each other's checkpoints, two predictions
would replace each other's tables."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

NAME = ".lock"


class InUse(ValueError):
    """Another process owns the folder."""


class Unusable(ValueError):
    """A path cannot serve as a folder of results."""

    def __init__(self, out: Path, why: str) -> None:
        super().__init__(out, why)
        self.out, self.why = out, why

    def __str__(self) -> str:
        return f"out: {self.out} cannot be written to: {self.why}; accepted is a folder, or a name for a new one"


def check(out: Path) -> None:
    """Refuse a path that plainly cannot be a folder of results; nothing is created.

    Raises:
        Unusable: `out`, or what is above it, is not a folder or is not writable.
    """
    for there in (out, *out.absolute().parents):
        try:
            os.lstat(there)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise Unusable(out, error.strerror or str(error)) from error
        break
    if not os.path.isdir(there):
        raise Unusable(out, f"{there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Unusable(out, f"{there} is not open for writing")


@contextmanager
def owned(out: Path, what: str = "training") -> Iterator[None]:
    """Own the folder `out` within this context, to the exclusion of other processes; it is created if it does not
    exist.

    A lock on a file decides, which the system releases when its process ends, however it ends; the file says whose lock
    it is. Where the file system has no locks, the file itself decides: a process of this host that no longer runs owns
    nothing.

    Args:
        what: the kind of work, for messages.

    Raises:
        InUse: another process owns it; the message says which, on which host, since when.
        Unusable: `out` is not a folder, or cannot be written to.
    """
    check(out)
    path = out / NAME
    with ExitStack() as until_left:
        try:
            out.mkdir(parents=True, exist_ok=True)
            descriptor = _acquire(path, out, what)
            until_left.callback(_release, path, descriptor)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_me()).encode(), 0)
        except OSError as error:
            raise Unusable(out, error.strerror or str(error)) from error
        yield


def _release(path: Path, descriptor: int) -> None:
    with contextlib.suppress(FileNotFoundError):  # the user has deleted it with its folder
        path.unlink()
    os.close(descriptor)


def _acquire(path: Path, out: Path, what: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Not `flock`, whose lock the workers of a killed run would hold on to until they notice.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken, hint = False, ""
        except (BlockingIOError, PermissionError):
            taken, hint = True, ""
        except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP: this file system has no locks
            taken, hint = _is_alive(_owner(descriptor)), f"; if it has, delete {path}"
        if taken:
            says = _describe(_owner(descriptor))
            os.close(descriptor)
            raise InUse(
                f"out: {out} is in use by another {what}{says}; accepted is another out, or this one once that has "
                f"ended{hint}"
            )
        # Its last owner may have deleted the file between our opening and locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _me() -> dict[str, object]:
    since = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _owner(descriptor: int) -> dict[str, object]:
    """What the owner wrote into the file; {} if it cannot be read."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_alive(owner: dict[str, object]) -> bool:
    """Whether the process that wrote `owner` may still run."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    if owner.get("host") != socket.gethostname():
        return True  # we cannot tell from here
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        return True
    return pid != os.getpid()


def _describe(owner: dict[str, object]) -> str:
    if not {"host", "pid", "since"} <= owner.keys():
        return ""
    return f" (process {owner['pid']} on {owner['host']}, since {owner['since']})"

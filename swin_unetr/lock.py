"""One owner for a folder of results: two trainings in it would delete each other's checkpoints, two predictions replace
each other's tables."""

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
    """Another process has the folder."""


class Unusable(ValueError):
    """What is asked for as a folder of results can be none."""

    def __init__(self, out: Path, why: str) -> None:
        super().__init__(out, why)
        self.out, self.why = out, why

    def __str__(self) -> str:
        return f"out: {self.out} cannot be written to: {self.why}; accepted is a folder, or a name for a new one"


def check(out: Path) -> None:
    """Refuse what is plain to see that it can be no folder of results, and make nothing.

    Raises:
        Unusable: `out`, or what is above it, is no folder, or nothing may be written there.
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
        raise Unusable(out, f"{there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Unusable(out, f"{there} is not open for writing")


@contextmanager
def owned(out: Path, what: str = "training") -> Iterator[None]:
    """Within this context no other process owns the folder `out`, which is made where there is none.

    The system's lock on a file decides, which ends with its process however that ends; the file says whose it is. Where
    a file system knows no locks, what the file says decides: a process of this host that is no more owns nothing.

    Args:
        what: what is done there.

    Raises:
        InUse: another process owns it; the message says which, on which host, since when.
        Unusable: it is no folder, or cannot be written to.
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
    with contextlib.suppress(FileNotFoundError):  # with the whole folder, by its user
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
    """What an owner wrote into the file; {} if nothing that can be read."""
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
        return True  # there is no telling from here
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return pid != os.getpid()


def _describe(owner: dict[str, object]) -> str:
    if not {"host", "pid", "since"} <= owner.keys():
        return ""
    return f" (process {owner['pid']} on {owner['host']}, since {owner['since']})"

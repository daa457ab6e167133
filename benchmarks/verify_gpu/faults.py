"""Faults planted on purpose, to test that a run survives them: ``SWIN_VERIFY_FAULTS="kind@where; kind@where"``.

`where` is part of the name of a step. A step is named after its measure, shape, variant and what it does, as in
``attention core, forward | f48 96³ stage 1 shifted | ours | check``, a GPU test after its id. Kinds:

- ``crash``: the process dies by SIGSEGV,
- ``hang``: the step never ends and ignores SIGTERM,
- ``sticky``: a CUDA error after which every call to the device fails, as after an illegal memory access,
- ``memory``: the error that PyTorch raises when memory has run out,
- ``wrong``: results are off; the step itself applies `spoiled` to them.
"""

from __future__ import annotations

import os
import signal
import time

VARIABLE = "SWIN_VERIFY_FAULTS"
KINDS = ("crash", "hang", "sticky", "memory", "wrong")
STICKY = "CUDA error: an illegal memory access was encountered (planted)"
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 5.00 GiB (planted)"

_sticky = False


def planted(where: str) -> str | None:
    """The kind of the first planted fault that names the step `where`.

    Raises:
        ValueError: the variable is not a list of faults.
    """
    for entry in filter(None, map(str.strip, os.environ.get(VARIABLE, "").split(";"))):
        kind, at, pattern = entry.partition("@")
        if kind not in KINDS or not at or not pattern:
            raise ValueError(f"{VARIABLE}: {entry!r} is not a fault; accepted are kind@where with {', '.join(KINDS)}")
        if pattern in where:
            return kind
    return None


def strike(where: str) -> None:
    """Fail as planted at the step `where`, or do nothing. "wrong" is left to `spoiled`."""
    global _sticky
    kind = planted(where)
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(60)
    if kind == "sticky":
        _sticky = True
    if kind == "memory":
        raise MemoryError(OUT_OF_MEMORY)
    check_device()


def check_device() -> None:
    """Raises what every call to the device raises after a sticky error, if one was planted and struck."""
    if _sticky:
        raise RuntimeError(STICKY)

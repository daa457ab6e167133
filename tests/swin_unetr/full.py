"""A full disk, simulated by the system's limit on what this process writes into one file."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

SAYS = os.strerror(errno.EFBIG)
"""What the system then says instead of "No space left on device"."""


@contextmanager
def after(size: int) -> Iterator[None]:
    """In this context no file can be written beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

"""Which kernel of `csrc/cuda` was the last to start, to find the cause of a crash, an error or a hang."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from . import library


@contextmanager
def trace_launches(file: int | IO) -> Iterator[None]:
    """Write the name of every kernel to `file` before it starts, in the whole process, within the context.

    Each launch also waits for its stream, unless that is being captured. An error on the stream is then raised by the
    call that launched the kernel named last, even if work that was started there before it caused the error.

    Args:
        file: a file or its descriptor; each launch writes a line to it, such as ``attend<BFloat16, 16>``, unbuffered.
    """
    if not isinstance(file, int):
        file.flush()
        file = file.fileno()
    library.operators().trace_launches(file)
    try:
        yield
    finally:
        library.operators().trace_launches(-1)

"""Which kernel of `csrc/cuda` was the last to start: what a crash, an error or a hang is the doing of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from . import library


@contextmanager
def trace_launches(file: int | IO) -> Iterator[None]:
    """Within the context every launch of the process writes its kernel's name to `file` before it starts.

    Each launch also waits for its stream, unless that is being captured. What goes wrong on the stream until then is an
    error of the call that names the kernel, even if it is the doing of other work that was started there before.

    Args:
        file: a file, or the descriptor of one; a line is written to it for each launch, such as
            ``attend<BFloat16, 16>``, past any buffer.
    """
    if not isinstance(file, int):
        file.flush()
        file = file.fileno()
    library.operators().trace_launches(file)
    try:
        yield
    finally:
        library.operators().trace_launches(-1)

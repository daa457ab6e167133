"""Standard output and error that survive their reader: a command must not fail because nobody reads what it prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


@contextmanager
def lasting() -> Iterator[None]:
    """Within this context writing to `sys.stdout` and `sys.stderr` never fails.

    When one cannot be written to (its reader ended, the terminal was closed, the disk is full), the other says so,
    once, and further output to it is discarded, that of child processes too. Characters that its encoding lacks are
    escaped.
    """
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    if sys.stdout is not None:
        sys.stdout = _Lasting(sys.stdout, "standard output", lambda text: print(text, file=sys.stderr))
    if sys.stderr is not None:
        sys.stderr = _Lasting(sys.stderr, "standard error", print)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Lasting):
                stream.flush()
        sys.stdout, sys.stderr = before


def _open_closed_descriptors() -> None:
    """Otherwise the first file to be opened would become the standard output of libraries and child processes."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


class _Lasting:
    """Writes to `stream` until that fails, then discards; otherwise behaves like `stream`."""

    def __init__(self, stream: TextIO, name: str, say: Callable[[str], None]) -> None:
        self._stream, self._name, self._say = stream, name, say
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lead_nowhere(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lead_nowhere(error)

    def _lead_nowhere(self, error: OSError) -> None:
        nowhere = open(os.devnull, "w")  # noqa: SIM115 - as long as the process
        with suppress(OSError, AttributeError):  # where it has no descriptor
            os.dup2(nowhere.fileno(), self._stream.fileno())  # what the old stream has buffered goes there, too
        self._stream = nowhere
        self._say(f"swin-unetr: {self._name} cannot be written to ({error.strerror or error}); going on without it")

"""Code in which coverage is not measured: other tests measure it already, and tracing makes it far slower."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """Nothing is traced in this thread while the context lasts."""
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)


def unmeasured_environment() -> dict[str, str]:
    """The environment, for processes that are not measured."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}

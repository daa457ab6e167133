"""Settings of the tests that run in Triton's interpreter, in a separate process."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter

import pytest
import torch
from triton.runtime import interpreter

from swin_kernels import use_backend
from swin_kernels.backends import BACKENDS
from tests.unmeasured import unmeasured

torch.set_num_threads(1)

# The interpreter checks every integer operation for overflow, which dropout's hash does on purpose, and at every call
# of a helper prepares `triton.language` again, though the launch has done so. Without both it is four times faster.
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
_call_helper = interpreter.InterpretedFunction.__call__


def _call(self, *args, **kwargs):
    if self.fn.__module__.startswith("swin_kernels."):
        return self.rewrite()(*args, **kwargs)
    return _call_helper(self, *args, **kwargs)


interpreter.InterpretedFunction.__call__ = _call


MEASURED = 2
"""Cases of each test in which coverage is measured: tracing makes the interpreter three times as slow."""

_cases: Counter[str] = Counter()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item):
    name = item.nodeid.partition("[")[0]
    _cases[name] += 1
    with unmeasured() if _cases[name] > MEASURED else contextlib.nullcontext():
        return (yield)


@pytest.fixture(autouse=True)
def kernels():
    """Every operator runs on the Triton kernels; memory that PyTorch allocates starts as NaN, so that a gap shows."""
    assert BACKENDS["triton"].unavailable() is None
    torch.use_deterministic_algorithms(True)
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)

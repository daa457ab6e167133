"""The Triton kernels without a GPU, in Triton's interpreter.

Triton decides when a kernel is defined whether it will be interpreted, so these tests run in separate processes, one
for each file of `interpreted/`, with ``TRITON_INTERPRET=1``. By hand:
``TRITON_INTERPRET=1 python -m pytest tests/triton/interpreted``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unmeasured import unmeasured_environment

HERE = Path(__file__).parent
FILES = sorted(path.name for path in (HERE / "interpreted").glob("test_*.py"))
UNMEASURED = "test_training.py"
"""Without coverage: it trains through code that the other files measure, and would take two minutes of CPU time."""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """One process per file, all at once, each with its own output file; ended with the module."""
    pytest.importorskip("triton", reason="Triton is not installed")
    logs = tmp_path_factory.mktemp("interpreted")
    running = {}
    for name in FILES:
        command = [sys.executable, "-m", "pytest", "--quiet", "--tb=short", "-p", "no:cacheprovider"]
        environment = unmeasured_environment() if name == UNMEASURED else os.environ
        with (logs / name).open("w") as log:
            running[name] = subprocess.Popen(
                [*command, HERE / "interpreted" / name],
                cwd=HERE.parents[1],
                env={**environment, "TRITON_INTERPRET": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    yield running, logs
    for process in running.values():
        process.kill()


@pytest.mark.parametrize("name", FILES)
def test_in_interpreter(processes, name):
    running, logs = processes
    if running[name].wait():
        pytest.fail(f"in the interpreter:\n{(logs / name).read_text()}", pytrace=False)

"""The Triton kernels without a GPU, in Triton's interpreter.

Triton decides when a kernel is defined whether it will be interpreted, so these tests run in processes of their own,
one a file of `interpreted/`, with ``TRITON_INTERPRET=1``. By hand:
``TRITON_INTERPRET=1 python -m pytest tests/triton/interpreted``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(path.name for path in (HERE / "interpreted").glob("test_*.py"))


@pytest.mark.parametrize("name", FILES)
def test_in_interpreter(name):
    pytest.importorskip("triton", reason="Triton is not installed")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--quiet",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            HERE / "interpreted" / name,
        ],
        cwd=HERE.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if result.returncode:
        pytest.fail(f"in the interpreter:\n{result.stdout}", pytrace=False)

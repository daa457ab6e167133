"""The contract of the CUDA kernels once more, on a build with AddressSanitizer and UndefinedBehaviorSanitizer.

In a process of its own, since AddressSanitizer must be there when Python starts. What it finds ends that process.
"""

from __future__ import annotations

import re
import subprocess
import sys

from . import builds


def test_contract():
    builds.build("sanitized")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=no"]
        + [f"tests/cuda/test_window_{name}.py" for name in ("attention", "partition")],
        env=builds.sanitizer_environment(),
        cwd=builds.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100
    assert "skipped" not in done.stdout

"""The contract of the CUDA kernels again, on a build with AddressSanitizer and UndefinedBehaviorSanitizer.

In a separate process, since AddressSanitizer must be loaded when Python starts. A finding ends that process.
"""

from __future__ import annotations

import re
import subprocess
import sys

from . import builds

TESTS = (
    "test_contract[",
    "test_forward_in_little_shared_memory",
    "test_partition_and_back",
    "test_empty_batch",
    "test_convolution[",
)
"""Each way in which a kernel can reach beyond a tensor; the plain build has further shapes, devices and orders."""


def test_contract():
    builds.build("sanitized")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=no"]
        + [f"tests/cuda/test_{name}.py" for name in ("window_attention", "window_partition", "convolution")]
        + ["-k", " or ".join(TESTS)],
        env=builds.sanitizer_environment(),
        cwd=builds.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    # 13 cases in three dtypes or two, 6 cuts of the forward, partition of 12 grids, 9 convolutions
    assert passed >= 65, done.stdout
    assert "skipped" not in done.stdout

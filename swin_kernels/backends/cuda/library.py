"""Finds and loads the CUDA library that the build put beside the package."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

LIBRARY = Path(__file__).resolve().parents[2] / "lib" / "libswin_kernels_cuda.so"

OLDEST = (8, 0)
"""Compute capability from which the kernels run (cp.async, bfloat16 on tensor cores)."""


@functools.cache
def unavailable() -> str | None:
    """Why the CUDA kernels cannot run here, or None; the first call loads the library."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no CUDA device"
    if not LIBRARY.is_file():
        return f"the CUDA library was not built ({LIBRARY} is missing): install nvcc and reinstall"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the CUDA library does not load: {error}"
    # The library brings its own CUDA runtime, which may be newer than the driver.
    reason = torch.ops.swin_kernels_cuda.attention_declines(1, 16, (2, 2, 2), False)
    return f"the CUDA library does not run here: {reason}" if reason else None


@functools.cache
def capability(device: int) -> tuple[int, int]:
    """Compute capability of CUDA device `device`."""
    return torch.cuda.get_device_capability(device)


def operators():
    """The operators of the loaded library; tests of this package replace them by emulated ones."""
    return torch.ops.swin_kernels_cuda

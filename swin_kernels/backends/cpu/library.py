"""Finds and loads the C++ library that the build put beside the package."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from ..in_place import guard_write

LIBRARY = Path(__file__).resolve().parents[2] / "lib" / "libswin_kernels_cpu.so"

_operators = torch.library.Library("swin_kernels_cpu", "IMPL")  # defined by the C++ library, once it is loaded
guard_write(_operators, "instance_norm_act_inplace")
for _name in ("isa", "projects"):  # `torch.jit.trace` refuses to record what returns no tensor
    _operators.impl(_name, torch.library.fallthrough_kernel, "Tracer")


@functools.cache
def unavailable() -> str | None:
    """Why the C++ kernels cannot run here, or None; the first call loads the library."""
    if not LIBRARY.is_file():
        return f"the C++ library was not built ({LIBRARY} is missing): install a C++17 compiler and reinstall"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"the C++ library does not load: {error}"
    return None

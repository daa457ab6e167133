"""Triton kernels for NVIDIA GPUs; with ``TRITON_INTERPRET=1``, the same kernels on CPU tensors, to check them."""

from __future__ import annotations

import functools
import importlib.util
from typing import ClassVar

import torch

from .. import Call, Package, register

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Element types that the kernels compute in; `window_partition` copies any type."""


class Triton(Package):
    summary = ("NVIDIA GPUs, compute capability ≥ 8.0", "see [what is not there yet](#what-is-not-there-yet)")
    ranks: ClassVar[dict[str, int]] = {"cuda": 1}

    def unavailable(self) -> str | None:
        return _unavailable()

    def declines_any(self, call: Call) -> str | None:
        from .tiles import INTERPRETED

        device = "cpu" if INTERPRETED else "cuda"
        if call.device != device:
            return f"the volume is on {call.device}, the kernels run on {device}"
        if getattr(self.kernel(call.kernel), "ANY_DTYPE", False):
            return None
        if call.dtype not in DTYPES:
            return f"dtype {call.dtype} has no kernel"
        if INTERPRETED and call.dtype == torch.bfloat16:
            return "Triton's interpreter computes bfloat16 wrongly"
        return None


@functools.cache
def _unavailable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from .tiles import INTERPRETED

    if INTERPRETED:
        return None
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, to check them)"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability()} is below 8.0"
    return None


register(Triton(__name__))

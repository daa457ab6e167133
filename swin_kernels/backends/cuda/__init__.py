"""CUDA C++ kernels for NVIDIA GPUs (`csrc/cuda`)."""

from __future__ import annotations

import functools

import torch

from .. import Call
from . import convolution, window_attention, window_partition
from .library import LIBRARY, OLDEST, capability, unavailable
from .preference import faster_elsewhere

__all__ = ["LIBRARY", "convolution", "supports", "unavailable", "window_attention", "window_partition"]

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""dtypes of `window_attention`, and their numbers in csrc/cuda/launchers.h."""


def supports(call: Call) -> str | None:
    if call.device != "cuda":
        return f"the volume is on {call.device}, the kernels run on cuda"
    device = torch.cuda.current_device()
    if capability(device) < OLDEST:
        return f"compute capability {capability(device)} is below {OLDEST}"
    if call.operator == "convolution":
        return convolution.declines(call)
    if call.operator != "window_attention":
        return None
    if call.dtype not in ELEMENTS:
        return f"dtype {call.dtype} has no kernel"
    if call.dropout:
        return "attention dropout has no kernel"
    return _declines(device, call.dtype, call.head_dim, call.window, call.backward) or faster_elsewhere(
        capability(device), call
    )


@functools.lru_cache(maxsize=4096)
def _declines(device: int, dtype: torch.dtype, head_dim: int, window: tuple[int, ...], backward: bool) -> str | None:
    """The kernels' own answer for windows of `window` tokens; it may depend on the memory of the `device`."""
    with torch.cuda.device(device):
        return torch.ops.swin_kernels_cuda.attention_declines(ELEMENTS[dtype], head_dim, window, backward) or None

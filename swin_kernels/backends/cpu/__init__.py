"""C++ kernels for the processor, one build for several vector widths (`csrc/cpu`)."""

from __future__ import annotations

import math

import torch

from .. import Call
from . import convolution, instance_norm_act, projected_window_attention, window_attention, window_partition
from .library import unavailable

__all__ = [
    "convolution",
    "instance_norm_act",
    "projected_window_attention",
    "supports",
    "unavailable",
    "window_attention",
    "window_partition",
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST_WINDOW = 4096
"""Tokens in a window (16³); `kLargestWindow` of csrc/torch/cpu.cpp."""


def supports(call: Call) -> str | None:
    if call.device != "cpu":
        return f"the volume is on {call.device}, this backend runs on the CPU"
    if call.operator in ("window_attention", "instance_norm_act") and call.dtype not in DTYPES:
        return f"dtype {call.dtype} has no kernel"
    if call.operator == "convolution" and call.dtype != torch.float32 and not convolution.converts(call.dtype):
        return f"dtype {call.dtype} has no kernel"
    if call.operator == "convolution" and len(call.window) != 3:
        return f"a convolution over {len(call.window)} axes; there is a kernel for 3"
    if call.operator == "projected_window_attention":
        if call.dtype != torch.float32:
            return f"dtype {call.dtype} has no kernel"
        if not torch.ops.swin_kernels_cpu.projects(call.heads, call.heads * call.head_dim, call.backward):
            return (
                f"{call.heads} heads of {call.head_dim} channels have no kernel on {torch.ops.swin_kernels_cpu.isa()}"
            )
    if call.operator.endswith("window_attention") and math.prod(call.window) > LARGEST_WINDOW:
        return f"a window of {math.prod(call.window)} tokens is larger than the {LARGEST_WINDOW} that fit in cache"
    return None

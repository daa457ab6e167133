"""Triton kernels for NVIDIA GPUs; with ``TRITON_INTERPRET=1``, the same kernels on CPU tensors, to check them."""

from __future__ import annotations

import functools

import torch

from .. import Call

try:
    from . import convolution, instance_norm_act, layer_norm, window_attention, window_partition
    from .tiles import INTERPRETED
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    INSTALLED = False
else:
    INSTALLED = True

__all__ = [
    "convolution",
    "instance_norm_act",
    "layer_norm",
    "supports",
    "unavailable",
    "window_attention",
    "window_partition",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_TOKENS = 16**3
MAX_HEAD_DIM = 128
MAX_PARTITION_TOKENS = 2**15  # the bound of `windows.divide`


@functools.cache
def unavailable() -> str | None:
    if not INSTALLED:
        return "Triton is not installed"
    if INTERPRETED:
        return None
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, to check them)"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability {torch.cuda.get_device_capability()} is below 8.0"
    return None


def _convolution_declines(call: Call) -> str | None:
    if call.dtype == torch.float32:
        return "float32 has no convolution kernel"
    if len(call.window) != 3:
        return f"a convolution over {len(call.window)} axes; there is a kernel for 3"
    if call.backward:
        return "gradients of a convolution have no kernel"
    return convolution.declines(*call.channels)


def supports(call: Call) -> str | None:
    device = "cpu" if INTERPRETED else "cuda"
    if call.device != device:
        return f"the volume is on {call.device}, the kernels run on {device}"
    tokens = 1
    for extent in call.window:
        tokens *= extent
    if call.operator in ("window_partition", "window_reverse"):
        if tokens > MAX_PARTITION_TOKENS:
            return f"a window of {tokens} tokens; at most {MAX_PARTITION_TOKENS} are supported"
        return None
    if call.dtype not in DTYPES:
        return f"dtype {call.dtype} has no kernel"
    if INTERPRETED and call.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    if call.operator in ("instance_norm_act", "layer_norm"):
        return None
    if call.operator == "convolution":
        return _convolution_declines(call)
    if tokens > MAX_TOKENS:
        return f"a window of {tokens} tokens; at most {MAX_TOKENS} are supported"
    if call.head_dim > MAX_HEAD_DIM:
        return f"head_dim {call.head_dim} is above {MAX_HEAD_DIM}"
    return None

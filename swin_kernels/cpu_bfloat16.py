"""Autocast to bfloat16 on a CPU: where PyTorch's operators are slow or wrong in it, blocks compute in float32.

Without instructions for bfloat16 a convolution of PyTorch's takes many times as long as in float32. With them, its
gradient of the weight contains uninitialised memory where a volume is thinner than the kernel: seen for 2×1×6 and
2×8×8 voxels with AVX512_BF16, for 1×9×1 with AMX. Blocks round their results to bfloat16 either way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn as nn

from .backends.reference.convolution import LEAST_EXTENT
from .ops._checks import autocast_is_on
from .ops._operator import constant_when_compiled


@constant_when_compiled
@functools.cache
def has_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16 that PyTorch uses."""
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def computes_in_float32(block: nn.Module, x: torch.Tensor) -> bool:
    """Whether `block` should compute in float32 for `x` ``(B, C, *S)``, whatever autocast says.

    Not where a parameter has another dtype, which autocast lets layers mix with float32.
    """
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and autocast_is_on(x.device)
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and (not has_bfloat16() or min(x.shape[2:]) < LEAST_EXTENT)
        and all(parameter.dtype == torch.float32 for parameter in block.parameters())
    )


def in_float32(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A block's `forward` of tensors or None, in float32 where `computes_in_float32` says so for the first."""

    @functools.wraps(forward)
    def run(self: nn.Module, x: torch.Tensor, /, *rest: torch.Tensor | None) -> torch.Tensor:
        if not computes_in_float32(self, x):
            return forward(self, x, *rest)
        with torch.autocast("cpu", enabled=False):
            out = forward(self, x.float(), *(t if t is None else t.float() for t in rest))
        return out.to(torch.bfloat16)

    return run

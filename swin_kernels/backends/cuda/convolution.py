"""The 3×3×3 convolution over a concatenation on the GPU: `csrc/cuda/convolution.cu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.grad import conv3d_weight

from .library import operators

if TYPE_CHECKING:
    from ...ops.convolution import ConvolutionCall

BLOCK = 48
"""Channels that a block of the kernel reads at a time, and writes."""

MOST_OUTPUTS = 64
"""Output channels up to which it runs. With more, PyTorch's convolutions waste nothing, and small volumes have too few
blocks here."""


def declines(call: ConvolutionCall) -> str | None:
    """Why there is no kernel for `call`, or None."""
    if call.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {call.dtype} has no kernel"
    if call.window != (3, 3, 3):
        return f"a convolution by {'×'.join(map(str, call.window))}; there is a kernel for 3×3×3"
    if any(channels % BLOCK for channels in call.channels):
        return f"channels {call.channels} have no kernel; there is one for multiples of {BLOCK}"
    if call.channels[2] > MOST_OUTPUTS:
        return f"PyTorch's convolution is as fast for {call.channels[2]} output channels"
    return None


def forward(x: torch.Tensor, skip: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """Arguments and result of the reference's `forward`."""
    return operators().convolution_forward(x, skip, packed(weight))


def backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    skip: torch.Tensor | None,
    weight: torch.Tensor,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Arguments and results of the reference's `backward`."""
    sources = [x] if skip is None else [x, skip]
    gradients: list[torch.Tensor | None] = [None, None]
    of_weight, first = [], 0
    for i, source in enumerate(sources):
        part = weight[:, first : first + source.shape[-1]]
        first += source.shape[-1]
        if wanted[i]:  # a convolution again, by the mirrored weight with its channels exchanged
            gradients[i] = operators().convolution_forward(grad_out, None, packed(part.flip(2, 3, 4).transpose(0, 1)))
        if wanted[2]:
            volumes = source.movedim(-1, 1), grad_out.movedim(-1, 1)  # (B, C, *S)
            of_weight.append(conv3d_weight(volumes[0], part.shape, volumes[1], padding=1))  # by PyTorch
    grad_weight = torch.cat(of_weight, 1).contiguous() if wanted[2] else None  # cuDNN's is channels last
    return gradients[0], gradients[1], grad_weight


def packed(weight: torch.Tensor) -> torch.Tensor:
    """``(N, C, 3, 3, 3)`` as the kernel reads it: ``(N / 48, C / 48, 27, 48, 48)``, input channels last."""
    blocks = weight.reshape(weight.shape[0] // BLOCK, BLOCK, weight.shape[1] // BLOCK, BLOCK, 27)
    return blocks.permute(0, 2, 4, 1, 3).contiguous()

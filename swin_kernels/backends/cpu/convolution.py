"""Convolution over a concatenation on the processor: `csrc/cpu/convolution`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ...ops.convolution import ConvolutionCall


def declines(call: ConvolutionCall) -> str | None:
    if call.dtype != torch.float32 and not converts(call.dtype):
        return f"dtype {call.dtype} has no kernel"
    if len(call.window) != 3:
        return f"a convolution over {len(call.window)} axes; there is a kernel for 3"
    return None


@functools.cache
def converts(dtype: torch.dtype) -> bool:
    """Whether it is faster to convert a 16-bit `dtype` to float32 and back: on a processor without arithmetic for it,
    PyTorch's convolution takes many times as long as in float32."""
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and not supported[dtype]()


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()


def forward(x: torch.Tensor, skip: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """Arguments and result of the reference's `forward`."""
    if x.dtype != torch.float32:
        return forward(x.float(), _float(skip), weight.float()).to(x.dtype)
    if x.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
    return torch.ops.swin_kernels_cpu.convolution_forward(x, skip, weight)


def backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    skip: torch.Tensor | None,
    weight: torch.Tensor,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Arguments and results of the reference's `backward`."""
    if x.dtype != torch.float32:
        found = backward(grad_out.float(), x.float(), _float(skip), weight.float(), wanted)
        grad_x, grad_skip, grad_weight = (None if g is None else g.to(x.dtype) for g in found)
        return grad_x, grad_skip, grad_weight
    sources = [x] if skip is None else [x, skip]
    gradients: list[torch.Tensor | None] = [None, None]
    of_weight, first = [], 0
    for i, source in enumerate(sources):
        count = source.shape[-1]
        if wanted[i]:
            gradients[i] = _backward_input(grad_out, weight, first, count)
        if wanted[2]:
            of_weight.append(_backward_weight(grad_out, source, weight.shape[-1]))
        first += count
    return gradients[0], gradients[1], torch.cat(of_weight, 1) if wanted[2] else None


def _backward_input(grad_out: torch.Tensor, weight: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """The gradient of input channels `first` to ``first + count``."""
    if grad_out.shape[0] == 0:
        return grad_out.new_empty((*grad_out.shape[:-1], count))
    return torch.ops.swin_kernels_cpu.convolution_backward_input(grad_out, weight, first, count)


def _backward_weight(grad_out: torch.Tensor, source: torch.Tensor, kernel: int) -> torch.Tensor:
    """The gradient of the part of the weight that multiplies `source`."""
    shape = (grad_out.shape[-1], source.shape[-1], *[kernel] * 3)
    if source.shape[0] == 0:
        return source.new_zeros(shape)
    if kernel == 1:
        return (grad_out.flatten(0, -2).mT @ source.flatten(0, -2)).view(shape)
    return torch.ops.swin_kernels_cpu.convolution_backward_weight(grad_out, source)

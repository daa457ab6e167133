"""Convolution over a concatenation on the processor: `csrc/cpu/convolution.h`, `convolution_weight_gradient.h`.

The gradient of a 1×1×1 weight is PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..reference.convolution import source_gradients


def forward(x: torch.Tensor, skip: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """Arguments and result of the reference's `forward`."""
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
    sources = [x] if skip is None else [x, skip]
    gradients, of_weight, first = [None, None], [], 0
    for i, source in enumerate(sources):
        count = source.shape[-1]
        if wanted[i]:
            gradients[i] = _backward_input(grad_out, weight, first, count)
        if wanted[2]:
            of_weight.append(_backward_weight(grad_out, source, weight[:, first : first + count]))
        first += count
    return *gradients, torch.cat(of_weight, 1) if wanted[2] else None


def _backward_input(grad_out: torch.Tensor, weight: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """The gradient of input channels `first` to ``first + count``."""
    if grad_out.shape[0] == 0:
        return grad_out.new_empty((*grad_out.shape[:-1], count))
    return torch.ops.swin_kernels_cpu.convolution_backward_input(grad_out, weight, first, count)


def _backward_weight(grad_out: torch.Tensor, source: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The gradient of `weight`, which is that of `source`."""
    if weight.shape[-1] == 1 or source.shape[0] == 0:
        return source_gradients(grad_out, source, weight, (False, True))[1]
    return torch.ops.swin_kernels_cpu.convolution_backward_weight(grad_out, source)

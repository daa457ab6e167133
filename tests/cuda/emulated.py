"""Calls the CUDA kernels on the CPU (`builds.load`), on PyTorch tensors.

Whatever the emulator finds wrong (a race, an access out of bounds, a missing wait) is raised as RuntimeError.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from swin_kernels.geometry import WindowGrid

from ..ops.cases import Case, Inputs
from .builds import load

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`SwinElement` of csrc/cuda/elements.h."""


def _array(x: torch.Tensor | None) -> np.ndarray | None:
    """The memory of `x` as an array; NumPy has no bfloat16, but the emulator needs only bytes."""
    return None if x is None else x.detach().view(torch.uint8).numpy()


def _grid(spatial: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> tuple[list[int], ...]:
    grid = WindowGrid.of(spatial, window, shift)
    return list(grid.spatial), list(grid.nominal), list(grid.window), list(grid.shift)


def attention(case: Case, dtype: torch.dtype):
    """`SwinAttention` of a case."""
    return load().Attention(
        ELEMENTS[dtype],
        ELEMENTS[torch.float32 if case.float_table else dtype],
        case.batch,
        case.heads,
        case.head_dim,
        *_grid(case.spatial, case.window, case.shift),
        case.head_dim**-0.5 if case.scale is None else case.scale,
    )


def forward(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``(B, *S, C)`` and log-sum-exp ``(B, *S, heads)`` of the forward kernel."""
    qkv, table = inputs.qkv, inputs.bias_table
    out = qkv.new_empty(*qkv.shape[:-1], case.heads * case.head_dim)
    lse = qkv.new_empty(*qkv.shape[:-1], case.heads, dtype=torch.float32)
    tensors = (qkv, table, inputs.pad_qkv, out, lse)
    load().forward(attention(case, qkv.dtype), *map(_array, tensors))
    return out, lse


def backward(case: Case, inputs: Inputs, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of qkv, bias_table and pad_qkv ``(3C,)`` by the backward kernels."""
    qkv, table = inputs.qkv, inputs.bias_table
    grads = torch.empty_like(qkv), torch.empty_like(table), qkv.new_empty(qkv.shape[-1])
    tensors = (inputs.grad_out, qkv, table, inputs.pad_qkv, out, lse, *grads)
    load().backward(attention(case, qkv.dtype), *map(_array, tensors))
    return grads


def _move(name: str, x: torch.Tensor, shape: tuple[int, ...], spatial, window, shift, batch: int) -> torch.Tensor:
    moved = x.new_empty(shape)
    call = load().Partition(x.element_size(), batch, x.shape[-1], *_grid(spatial, window, shift))
    getattr(load(), name)(call, _array(x), _array(moved))
    return moved


def window_partition(x: torch.Tensor, window: Sequence[int], shift: Sequence[int]) -> torch.Tensor:
    """``(B, *S, C)`` to ``(B·nW, n, C)``."""
    batch, *spatial, channels = x.shape
    grid = WindowGrid.of(spatial, window, shift)
    return _move("partition", x, (batch * grid.num_windows, grid.tokens, channels), spatial, window, shift, batch)


def window_reverse(
    windows: torch.Tensor, window: Sequence[int], shift: Sequence[int], spatial: Sequence[int]
) -> torch.Tensor:
    """``(B·nW, n, C)`` to ``(B, *S, C)``."""
    batch = windows.shape[0] // WindowGrid.of(spatial, window, shift).num_windows
    return _move("reverse", windows, (batch, *spatial, windows.shape[-1]), spatial, window, shift, batch)


def convolution(x: torch.Tensor, skip: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
    """``(B, *S, C1)`` and ``(B, *S, C2)`` with the weight as the kernel reads it to ``(B, *S, N)``."""
    batch, *spatial, channels = x.shape
    skip_channels = 0 if skip is None else skip.shape[-1]
    out = x.new_full((batch, *spatial, 48 * weight.shape[0]), float("nan"))
    call = load().Convolution(ELEMENTS[x.dtype], batch, spatial, channels, skip_channels, out.shape[-1])
    load().convolve(call, *map(_array, (x, skip, weight, out)))
    return out

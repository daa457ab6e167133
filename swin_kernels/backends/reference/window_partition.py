"""Window partition and reverse by one gather each."""

from __future__ import annotations

import math

import torch

from ...geometry import WindowGrid, token_index


def forward(x: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
    """``(B, *S, C)`` to ``(B·nW, n, C)``; padding tokens are zero."""
    index = token_index(grid).to(x.device)  # (nW, n)
    tokens = x.flatten(1, -2)  # (B, prod(S), C)
    windows = tokens[:, index.clamp(min=0)]  # (B, nW, n, C)
    windows = windows.masked_fill((index < 0)[..., None], 0)
    return windows.flatten(0, 1)  # (B·nW, n, C)


def backward(windows: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
    """``(B·nW, n, C)`` back to ``(B, *S, C)``; padding tokens are dropped."""
    index = token_index(grid).to(windows.device).flatten()  # (nW·n,)
    batch = windows.shape[0] // grid.num_windows
    tokens = windows.reshape(batch, index.numel(), windows.shape[-1])  # (B, nW·n, C)
    place = torch.argsort(index)[-math.prod(grid.spatial) :]  # where each token is; padding, -1, comes before
    return tokens[:, place].reshape(batch, *grid.spatial, windows.shape[-1])  # (B, *S, C)

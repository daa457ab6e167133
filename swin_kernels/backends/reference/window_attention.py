"""Shifted-window attention written out in PyTorch: partition, scores, softmax, values, reverse."""

from __future__ import annotations

import torch

from ...geometry import MASK_VALUE, WindowGrid, bias_index, dropout_keep, region_labels
from . import window_partition


def forward(
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    pad_qkv: torch.Tensor | None,
    seed: torch.Tensor | None,
    grid: WindowGrid,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention output ``(B, *S, C)`` and the log-sum-exp of each score row ``(B, *S, heads)``.

    Args:
        qkv: ``(B, *S, 3C)``, ordered q, k, v, then heads, then head_dim.
        bias_table: ``(prod(2w - 1), heads)``.
        pad_qkv: ``(3C,)`` carried by padding tokens, or None for zeros.
        seed: int64 ``(1,)`` for dropout, or None without.
        grid: the windows.
        scale: factor on ``q · k``.
        dropout_p: probability of dropping an attention weight.
    """
    heads = bias_table.shape[1]
    accumulate = torch.promote_types(qkv.dtype, torch.float32)
    tokens = grid.tokens

    windows = window_partition.forward(qkv, grid)  # (B·nW, n, 3C)
    if pad_qkv is not None and grid.is_padded:
        real = qkv.new_ones(qkv.shape[0], *grid.spatial, 1, dtype=torch.bool)
        windows = torch.where(window_partition.forward(real, grid), windows, pad_qkv)
    q, k, v = windows.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # 3 × (B·nW, heads, n, head_dim)

    scores = (q.to(accumulate) * scale) @ k.to(accumulate).transpose(-2, -1)  # (B·nW, heads, n, n)
    bias = bias_table[bias_index(grid.nominal, tokens).to(qkv.device)]  # (n, n, heads)
    scores = scores + bias.permute(2, 0, 1).to(accumulate)
    if grid.is_shifted:
        labels = region_labels(grid).to(qkv.device)  # (nW, n)
        mask = MASK_VALUE * (labels[:, :, None] != labels[:, None, :]).to(accumulate)  # (nW, n, n)
        scores = (scores.unflatten(0, (qkv.shape[0], grid.num_windows)) + mask[:, None]).flatten(0, 1)

    lse = torch.logsumexp(scores, dim=-1)  # (B·nW, heads, n)
    weights = torch.softmax(scores, dim=-1)
    if dropout_p > 0:
        rows = torch.arange(lse.numel(), device=qkv.device).view(lse.shape)
        weights = weights * dropout_keep(seed, rows, tokens, dropout_p) / (1 - dropout_p)
    out = (weights @ v.to(accumulate)).transpose(1, 2).flatten(2)  # (B·nW, n, C)
    return (
        window_partition.backward(out.to(qkv.dtype), grid),  # (B, *S, C)
        window_partition.backward(lse.transpose(1, 2), grid),  # (B, *S, heads)
    )


def backward(
    grad_out: torch.Tensor,
    qkv: torch.Tensor,
    bias_table: torch.Tensor,
    pad_qkv: torch.Tensor | None,
    seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grid: WindowGrid,
    scale: float,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `qkv`, `bias_table` and the value of a padding token ``(3C,)``, by autograd.

    `out` and `lse` are not needed here: the forward is computed again.
    """
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (qkv, bias_table)]
        pad = qkv.new_zeros(qkv.shape[-1]) if pad_qkv is None else pad_qkv.detach()
        leaves.append(pad.requires_grad_())
        again, _ = forward(*leaves, seed, grid, scale, dropout_p)
        return torch.autograd.grad(again, leaves, grad_out, materialize_grads=True)

"""Shifted-window attention written out in PyTorch: partition, scores, softmax, values, reverse."""

from __future__ import annotations

import torch

from ...geometry import MASK_VALUE, WindowGrid, bias_index, dropout_keep, region_labels, token_index
from . import window_partition


def _windows(qkv: torch.Tensor, pad_qkv: torch.Tensor | None, grid: WindowGrid) -> torch.Tensor:
    """``(B·nW, n, 3C)``, padding tokens carrying `pad_qkv`."""
    windows = window_partition.forward(qkv, grid)  # (B·nW, n, 3C)
    if pad_qkv is None or not grid.is_padded:
        return windows
    return torch.where(_is_padding(qkv, grid), pad_qkv, windows)


def _is_padding(qkv: torch.Tensor, grid: WindowGrid) -> torch.Tensor:
    """Which window tokens are padding: ``(B·nW, n, 1)``."""
    padding = (token_index(grid) < 0).to(qkv.device)  # (nW, n)
    return padding.repeat(qkv.shape[0], 1)[..., None]


def _heads(windows: torch.Tensor, heads: int) -> torch.Tensor:
    """``(B·nW, n, heads · head_dim)`` to ``(B·nW, heads, n, head_dim)`` in the dtype of the arithmetic."""
    return windows.unflatten(-1, (heads, -1)).transpose(1, 2).to(torch.promote_types(windows.dtype, torch.float32))


def _scores(
    q: torch.Tensor, k: torch.Tensor, bias_table: torch.Tensor, batch: int, grid: WindowGrid, scale: float
) -> torch.Tensor:
    """``scale · q kᵀ + bias + mask``: ``(B·nW, heads, n, n)``."""
    scores = (q * scale) @ k.transpose(-2, -1)
    bias = bias_table[bias_index(grid.nominal, grid.tokens).to(q.device)]  # (n, n, heads)
    scores = scores + bias.permute(2, 0, 1).to(scores.dtype)
    if grid.is_shifted:
        labels = region_labels(grid).to(q.device)  # (nW, n)
        mask = MASK_VALUE * (labels[:, :, None] != labels[:, None, :]).to(scores.dtype)  # (nW, n, n)
        scores = scores + mask.repeat(batch, 1, 1)[:, None]
    return scores


def _survival(weights: torch.Tensor, seed: torch.Tensor | None, dropout_p: float) -> torch.Tensor | float:
    """What dropout multiplies the attention weights ``(B·nW, heads, n, n)`` by: 0 or ``1 / (1 - p)``."""
    if dropout_p == 0:
        return 1.0
    assert seed is not None  # the operator checks it
    rows = torch.arange(weights[..., 0].numel(), device=weights.device).view(weights.shape[:-1])
    return dropout_keep(seed, rows, weights.shape[-1], dropout_p).to(weights.dtype) / (1 - dropout_p)


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
    if qkv.shape[0] == 0:  # no windows, whatever their size
        volume, wide = qkv.shape[:-1], torch.promote_types(qkv.dtype, torch.float32)
        return qkv.new_empty((*volume, qkv.shape[-1] // 3)), qkv.new_empty((*volume, heads), dtype=wide)
    q, k, v = (_heads(x, heads) for x in _windows(qkv, pad_qkv, grid).chunk(3, dim=-1))  # (B·nW, heads, n, head_dim)
    scores = _scores(q, k, bias_table, qkv.shape[0], grid, scale)  # (B·nW, heads, n, n)
    lse = torch.logsumexp(scores, dim=-1)  # (B·nW, heads, n)
    weights = torch.softmax(scores, dim=-1)
    out = (weights * _survival(weights, seed, dropout_p) @ v).transpose(1, 2).flatten(2)  # (B·nW, n, C)
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
    """Gradients of `qkv`, `bias_table` and the value of a padding token ``(3C,)``.

    `out` and `lse` are not needed here: the weights are computed again.
    """
    if qkv.shape[0] == 0:
        return torch.empty_like(qkv), torch.zeros_like(bias_table), qkv.new_zeros(qkv.shape[-1])
    heads = bias_table.shape[1]
    windows = _windows(qkv, pad_qkv, grid)  # (B·nW, n, 3C)
    q, k, v = (_heads(x, heads) for x in windows.chunk(3, dim=-1))  # (B·nW, heads, n, head_dim)
    grad = _heads(window_partition.forward(grad_out, grid), heads)  # (B·nW, heads, n, head_dim), 0 on padding
    weights = torch.softmax(_scores(q, k, bias_table, qkv.shape[0], grid, scale), dim=-1)  # (B·nW, heads, n, n)
    survival = _survival(weights, seed, dropout_p)

    grad_weights = grad @ v.transpose(-2, -1) * survival
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))  # (B·nW, heads, n, n)
    grad_q = scale * grad_scores @ k
    grad_k = scale * grad_scores.transpose(-2, -1) @ q
    grad_v = (weights * survival).transpose(-2, -1) @ grad
    grad_windows = torch.cat([g.transpose(1, 2).flatten(2) for g in (grad_q, grad_k, grad_v)], dim=-1)  # (B·nW, n, 3C)

    index = bias_index(grid.nominal, grid.tokens).to(qkv.device).flatten()  # (n·n,)
    by_pair = grad_scores.sum(0).flatten(1).T  # (n·n, heads)
    grad_bias_table = by_pair.new_zeros(bias_table.shape).index_add(0, index, by_pair)
    grad_pad = (grad_windows * _is_padding(qkv, grid)).sum((0, 1))  # (3C,)
    return (
        window_partition.backward(grad_windows.to(qkv.dtype), grid),
        grad_bias_table.to(bias_table.dtype),
        grad_pad.to(qkv.dtype),
    )

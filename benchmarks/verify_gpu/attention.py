"""The attention core and its peers, all on tensors in natural layout, and the branch of a block around them.

Peers partition with PyTorch's operators, as their users do: nothing that ours is compared with, least of all the
float64 truth, runs on our kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import swin_kernels
from swin_kernels import geometry, window_partition, window_reverse

WINDOW = (7, 7, 7)


@dataclass(frozen=True)
class Shape:
    """A block of Swin UNETR: `extent` voxels per axis, stage 1 to 4."""

    extent: int
    stage: int
    shifted: bool = True
    feature_size: int = 48
    window: tuple[int, ...] = WINDOW

    @property
    def tokens(self) -> tuple[int, ...]:
        return (self.extent // 2**self.stage,) * 3

    @property
    def channels(self) -> int:
        return self.feature_size * 2 ** (self.stage - 1)

    @property
    def heads(self) -> int:
        return 3 * 2 ** (self.stage - 1)

    @property
    def shift(self) -> tuple[int, ...]:
        return tuple(w // 2 if self.shifted else 0 for w in self.window)

    @property
    def grid(self) -> geometry.WindowGrid:
        return geometry.WindowGrid.of(self.tokens, self.window, self.shift)

    @property
    def scores(self) -> int:
        return self.grid.num_windows * self.heads * self.grid.tokens**2

    def __str__(self) -> str:
        return f"f{self.feature_size} {self.extent}³ stage {self.stage}{' shifted' if self.shifted else ''}"


@dataclass
class Inputs:
    """Leaves of one call and the gradient that enters it."""

    qkv: torch.Tensor
    table: torch.Tensor
    pad: torch.Tensor
    grad: torch.Tensor

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype, device: str) -> Inputs:
        generator = torch.Generator().manual_seed(0)

        def leaf(*size: int, to: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(device, to).requires_grad_()

        rows = geometry.bias_table_length(shape.window)
        return cls(
            leaf(1, *shape.tokens, 3 * shape.channels),
            leaf(rows, shape.heads, to=torch.float32),
            leaf(3 * shape.channels),
            leaf(1, *shape.tokens, shape.channels).detach(),
        )

    def double(self) -> Inputs:
        qkv, table, pad = (t.detach().double().requires_grad_() for t in self.leaves)
        return Inputs(qkv, table, pad, self.grad.double())

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        return self.qkv, self.table, self.pad


def run(shape: Shape, t: Inputs, backend: str | None = None) -> torch.Tensor:
    """`window_attention` on the backend that would be chosen, or on `backend`."""
    return swin_kernels.window_attention(t.qkv, t.table, shape.window, shape.shift, pad_qkv=t.pad, backend=backend)


def plain(shape: Shape, t: Inputs) -> torch.Tensor:
    """MONAI's chain in plain PyTorch: partition, scores, softmax, values, reverse."""
    q, k, v = _windows(shape, t)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + _bias_and_mask(shape, t)
    return _natural(shape, torch.softmax(scores, dim=-1).to(v.dtype) @ v)


def sdpa(shape: Shape, t: Inputs) -> torch.Tensor:
    q, k, v = _windows(shape, t)
    added = _bias_and_mask(shape, t).to(q.dtype).expand(q.shape[0], -1, -1, -1).contiguous()
    return _natural(shape, F.scaled_dot_product_attention(q, k, v, attn_mask=added))


def flex(shape: Shape, t: Inputs) -> torch.Tensor:
    q, k, v = _windows(shape, t)
    return _natural(shape, _compiled_flex()(q, k, v, score_mod=_score_mod(shape, t)))


_cache: dict = {}


def _compiled_flex() -> Callable:
    if "flex" not in _cache:
        from torch.nn.attention.flex_attention import flex_attention

        # The backward alone is timed by running it repeatedly on what the forward kept.
        torch._functorch.config.donated_buffer = False
        _cache["flex"] = torch.compile(flex_attention, dynamic=False)
    return _cache["flex"]


def _constants(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Bias index ``(n, n)`` and region labels ``(nW, n)``, built once as MONAI does."""
    key = (shape, device)
    if key not in _cache:
        index = geometry.bias_index(shape.grid.nominal, shape.grid.tokens)
        _cache[key] = index.to(device), geometry.region_labels(shape.grid).to(device)
    return _cache[key]


def _score_mod(shape: Shape, t: Inputs) -> Callable:
    index, labels = _constants(shape, t.qkv.device)
    windows, table, shifted = shape.grid.num_windows, t.table, shape.grid.is_shifted

    def score_mod(score, b, h, i, j):
        score = score + table[index[i, j], h]
        if shifted:
            score = score + torch.where(labels[b % windows, i] == labels[b % windows, j], 0.0, geometry.MASK_VALUE)
        return score

    return score_mod


def _windows(shape: Shape, t: Inputs) -> tuple[torch.Tensor, ...]:
    grid = shape.grid
    partition = partial(window_partition, window_size=shape.window, shift_size=shape.shift, backend="reference")
    windows = partition(t.qkv)  # (nW, n, 3C)
    if grid.is_padded:
        real = partition(t.qkv.new_ones(*t.qkv.shape[:-1], 1)) > 0
        windows = torch.where(real, windows, t.pad)
    return windows.unflatten(-1, (3, shape.heads, -1)).permute(2, 0, 3, 1, 4).unbind()  # 3 × (nW, heads, n, head_dim)


def _bias_and_mask(shape: Shape, t: Inputs) -> torch.Tensor:
    """``(1 or nW, heads, n, n)``."""
    index, labels = _constants(shape, t.qkv.device)
    bias = t.table[index].permute(2, 0, 1)[None]
    if not shape.grid.is_shifted:
        return bias
    return bias + geometry.MASK_VALUE * (labels[:, None, :, None] != labels[:, None, None, :]).to(bias)


def _natural(shape: Shape, out: torch.Tensor) -> torch.Tensor:
    windows = out.transpose(1, 2).flatten(2)  # (nW, n, C)
    return window_reverse(windows, shape.window, shape.shift, shape.tokens, backend="reference")


def branch(core: Callable, weights: tuple[torch.Tensor, ...]) -> Callable:
    """The attention branch of a block - norm, qkv projection, attention, projection - around a core."""

    def run(shape: Shape, t: Inputs) -> torch.Tensor:
        x = F.layer_norm(t.qkv[..., : shape.channels], (shape.channels,))
        qkv = F.linear(x, weights[0].to(x.dtype), t.pad)  # a padding token has the bias of the projection
        return F.linear(core(shape, Inputs(qkv, t.table, t.pad, t.grad)), weights[1].to(x.dtype))

    return run


def backward_alone(call: Callable[[Inputs], torch.Tensor], t: Inputs) -> Callable[[], list[torch.Tensor]]:
    """The gradients without the forward, which runs once."""
    out: list[torch.Tensor] = []

    def run() -> list[torch.Tensor]:
        if not out:
            out.append(call(t))
        return list(torch.autograd.grad(out[0], t.leaves, t.grad, retain_graph=True))

    return run


def gradients(call: Callable[[Inputs], torch.Tensor], t: Inputs) -> list[torch.Tensor]:
    out = call(t)
    return [out.detach(), *torch.autograd.grad(out, t.leaves, t.grad)]

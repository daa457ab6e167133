"""The Swin Transformer as `torch.nn` modules over volumes that stay in their natural layout.

Attribute names, parameter shapes and initial values are those of MONAI's Swin UNETR
(`monai.networks.nets.swin_unetr`), so state dicts can be exchanged and `accelerate` can give these
``forward`` methods to modules that MONAI built; a ``forward`` here therefore reads only attributes
that both have. What differs is the data path: tokens are ``(B, *S, C)`` from the patch
embedding to the last stage, and padding, shift, windows and mask happen inside `window_attention`.

Sources: Liu et al., "Swin Transformer", https://arxiv.org/abs/2103.14030; Hatamizadeh et al.,
"Swin UNETR", https://arxiv.org/abs/2201.01266; He et al., "SwinUNETR-V2" (residual blocks),
https://doi.org/10.1007/978-3-031-43901-8_40.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeGuard

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .backends import as_forced_now
from .cpu_bfloat16 import computes_in_float32
from .geometry import WindowGrid, bias_index, bias_table_length
from .ops._checks import autocast_is_on, per_axis
from .ops._operator import has_kernel, is_transformed
from .ops.layer_norm import autocast_layer_norm
from .ops.projected_window_attention import projected_window_attention
from .ops.window_attention import window_attention
from .ops.window_partition import window_partition, window_reverse
from .plain import is_plain, is_unchanged

__all__ = [
    "MERGING_MODES",
    "BasicLayer",
    "DropPath",
    "Mlp",
    "PatchMerging",
    "PatchMergingLegacy",
    "PatchMergingV2",
    "SwinTransformer",
    "SwinTransformerBlock",
    "WindowAttention",
]


class WindowAttention(nn.Module):
    """Multi-head self-attention inside the (shifted) windows of a volume, projections included."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Sequence[int],
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        """
        Args:
            dim: channels ``C``, a multiple of `num_heads`.
            num_heads: attention heads.
            window_size: nominal window, one extent per spatial axis.
            qkv_bias: whether the projection to queries, keys and values has a bias.
            attn_drop: probability of dropping an attention weight.
            proj_drop: probability of dropping an output element.
        """
        super().__init__()
        self.dim = dim
        self.window_size = window_size
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros(bias_table_length(window_size), num_heads))
        # Not used by the operator, which computes the index; checkpoints contain it.
        self.relative_position_index: torch.Tensor
        self.register_buffer("relative_position_index", bias_index(window_size, math.prod(window_size)))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        _init_bias_table(self.relative_position_bias_table)

    def forward(
        self, x: torch.Tensor, shift_size: int | Sequence[int] = 0, norm: nn.Module | None = None
    ) -> torch.Tensor:
        """Attend; ``(B, *S, C)`` to ``(B, *S, C)``.

        Args:
            x: tokens ``(B, *S, C)``, normalised unless `norm` does it.
            shift_size: cyclic shift of the windows, an int or one per axis.
            norm: applied to `x` first, by the kernel where it can.
        """
        if not (is_unchanged(self.qkv, nn.Linear) and self._ends_plainly()):
            return self._around_windows(x if norm is None else norm(x), shift_size)
        if not self._has_kernel(x, norm):
            qkv = self.qkv(x if norm is None else _norm_before(self.qkv, norm, x))
            return self.proj_drop(self.proj(self._attend(qkv, shift_size, self.qkv.bias)))
        parameters: dict[str, Any] = {"out_weight": self.proj.weight, "out_bias": self.proj.bias}
        if _is_norm_of(norm, x):
            parameters |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}
        elif norm is not None:
            x = norm(x)
        table = self.relative_position_bias_table
        out = projected_window_attention(
            x, self.qkv.weight, self.qkv.bias, table, self.window_size, shift_size, scale=self.scale, **parameters
        )
        return self.proj_drop(out)

    def _has_kernel(self, x: torch.Tensor, norm: nn.Module | None) -> bool:
        """Whether a kernel computes the projections around the attention of `x` too."""
        if self._dropout_p() > 0 or type(self.qkv) is not nn.Linear:  # a proxy, which `torch.export` must see called
            return False
        table, weight = self.relative_position_bias_table, self.qkv.weight
        norms = [norm.weight, norm.bias] if _is_norm_of(norm, x) else []
        given = [x, weight, self.qkv.bias, table, self.proj.weight, self.proj.bias, *norms]
        tensors = [t for t in given if t is not None]
        if is_transformed() or autocast_is_on(x.device) or len({(t.dtype, t.device) for t in tensors}) > 1:
            return False
        backward = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if torch.compiler.is_exporting():
            return not backward  # for inference the graph has the operator, whichever machine it is traced on
        # Constants also where the extents of x are symbols.
        heads, channels = int(table.shape[-1]), int(weight.shape[1])
        return channels % heads == 0 and has_kernel(
            "projected_window_attention",
            device=x.device.type,
            dtype=x.dtype,
            backward=backward,
            heads=heads,
            head_dim=channels // heads,
            window=tuple(self.window_size),  # the clipped one would be a symbol; it is no larger
        )

    def _ends_plainly(self) -> bool:
        """Whether the layers after the attention are plain: they treat every token alike and by itself."""
        return is_unchanged(self.proj, nn.Linear) and is_unchanged(self.proj_drop, nn.Dropout, nn.Identity)

    def _dropout_p(self) -> float:
        return self.attn_drop.p if self.attn_drop.training else 0.0

    def _attend(
        self, qkv: torch.Tensor, shift_size: int | Sequence[int], pad_qkv: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`window_attention` as this module has it; ``(B, *S, 3C)`` to ``(B, *S, C)``."""
        p = self._dropout_p()
        out = window_attention(
            qkv,
            self.relative_position_bias_table,
            self.window_size,
            shift_size,
            pad_qkv=pad_qkv,
            scale=self.scale,
            dropout_p=p if p < 1 else 0.0,
        )
        return F.dropout(out, 1.0) if p == 1 else out  # every weight is dropped; the operator accepts only p < 1

    def _around_windows(self, x: torch.Tensor, shift_size: int | Sequence[int]) -> torch.Tensor:
        """`forward` of normalised tokens, with layers called as upstream calls them.

        An adapter, a hook, a quantised or a sharded layer may look at all tokens that it is given, padding included. So
        `qkv` gets windows ``(B·nW, n, C)``, in one call, and so do `proj` and `proj_drop` unless both are plain.
        """
        shift = per_axis(shift_size, x.dim() - 2, f"{type(self).__name__}: shift_size")
        where = tuple(self.window_size), shift
        grid = WindowGrid.of(extents(x), *where)
        qkv = window_reverse(self.qkv(window_partition(x, *where)), *where, grid.padded)  # (B, *padded, 3C)
        out = self._attend(qkv, shift)  # (B, *padded, C)
        if self._ends_plainly():
            return self.proj_drop(self.proj(out[(slice(None), *map(slice, grid.spatial))]))
        windows = self.proj_drop(self.proj(window_partition(out, *where)))  # (B·nW, n, C)
        return window_reverse(windows, *where, grid.spatial)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        name = f"{prefix}relative_position_index"
        index = state_dict.get(name, self.relative_position_index)
        if index.shape == self.relative_position_index.shape and not holds_bias_index(index, self.window_size):
            errors.append(
                f"{name} is not the index of a window of {tuple(self.window_size)}, the only one that the fused "
                "attention computes; call swin_kernels.restore(model) first, so that MONAI's code uses the given index"
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def extents(x: torch.Tensor) -> tuple[int, ...]:
    """``S`` of ``(B, *S, C)``, as numbers also under `torch.jit.trace`, where they are tensors."""
    return tuple(int(e) if torch.jit.is_tracing() else e for e in x.shape[1:-1])


_EXPECTED_INDEX: dict[tuple[tuple[int, ...], torch.device], torch.Tensor] = {}
"""`geometry.bias_index` by window and device: data-parallel training writes to buffers before every forward."""


def holds_bias_index(index: torch.Tensor, window_size: Sequence[int]) -> bool:
    """Whether a module's ``relative_position_index`` has the values of `geometry.bias_index`, or none (on "meta")."""
    if index.is_meta:
        return True
    key = tuple(window_size), index.device
    if (expected := _EXPECTED_INDEX.get(key)) is None:
        with torch.device(index.device):  # weights may be loaded under `torch.device("meta")`
            expected = bias_index(window_size, math.prod(window_size))
        if type(expected) is torch.Tensor and not is_transformed():  # else it belongs to a tracer
            _EXPECTED_INDEX[key] = expected
    return torch.equal(index.to(expected), expected)


def _is_norm_of(norm: nn.Module | None, x: torch.Tensor) -> TypeGuard[nn.LayerNorm]:
    """Whether `norm` is a plain layer norm over the channels of `x` ``(..., C)``."""
    return is_plain(norm, nn.LayerNorm) and norm.normalized_shape == x.shape[-1:]


def _norm_before(linear: nn.Module | None, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``norm(x)`` for `linear`, which alone uses it."""
    if _is_norm_of(norm, x) and is_plain(linear, nn.Linear):
        return autocast_layer_norm(x, norm.weight, norm.bias, norm.eps, for_linear=True)
    return norm(x)


def _init_bias_table(table: torch.Tensor) -> None:
    """Normal values of deviation 0.02 by inverse transform; the same draws from the generator as upstream's."""
    with torch.no_grad():
        table.uniform_(-1, 1).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-2, 2)


def _checkpoint(function: Callable, *arguments: object) -> torch.Tensor:
    """`function` of the arguments, computed again in the backward, on the backend that is forced now."""
    if torch.compiler.is_compiling():
        return checkpoint(function, *arguments, use_reentrant=False)
    return checkpoint(function, *arguments, use_reentrant=False, context_fn=as_forced_now)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., https://arxiv.org/abs/1603.09382): drops samples of a branch in training."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        if not 0 <= drop_prob <= 1:
            raise ValueError(f"DropPath: drop_prob is {drop_prob}; accepted is 0 ≤ drop_prob ≤ 1")
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.drop_prob)  # (B, 1, …)
        return x * (keep / (1 - self.drop_prob) if self.drop_prob < 1 else keep)


class Mlp(nn.Module):
    """Linear, GELU, linear, with dropout after each; `hidden_dim` 0 means `dim`."""

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim or dim)
        self.linear2 = nn.Linear(hidden_dim or dim, dim)
        self.fn = nn.GELU()
        self.drop1 = self.drop2 = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop2(self.linear2(self.drop1(self.fn(self.linear1(x)))))


class SwinTransformerBlock(nn.Module):
    """Norm, window attention and residual; norm, MLP and residual."""

    mlp_class: ClassVar[type[Any]] = Mlp
    """The class of MLP that is known to use its input only in ``linear1``."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Sequence[int],
        shift_size: Sequence[int],
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: type[nn.LayerNorm] = nn.LayerNorm,
        use_checkpoint: bool = False,
    ) -> None:
        """
        Args:
            dim: channels ``C``, a multiple of `num_heads`.
            num_heads: attention heads.
            window_size: nominal window, one extent per spatial axis.
            shift_size: cyclic shift, one per axis, below `window_size`.
            mlp_ratio: hidden channels of the MLP over `dim`.
            qkv_bias: whether the projection to queries, keys and values has a bias.
            drop: dropout of projections and MLP.
            attn_drop: dropout of attention weights.
            drop_path: stochastic depth.
            norm_layer: called with `dim`.
            use_checkpoint: compute both branches again in the backward instead of keeping what they computed.
        """
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = window_size
        self.shift_size = shift_size
        self.mlp_ratio = mlp_ratio
        self.use_checkpoint = use_checkpoint
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(dim, num_heads, window_size, qkv_bias, attn_drop, drop)
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp: nn.Module = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward_part1(self, x: torch.Tensor, mask_matrix: torch.Tensor | None = None) -> torch.Tensor:
        """The attention branch, without residual."""
        return self.attn(x, self.shift_size, self.norm1)

    def forward_part2(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP branch, without residual."""
        mlp = self.mlp
        first = mlp.linear1 if is_plain(mlp, self.mlp_class) else None  # any other may use its input elsewhere
        return self.drop_path(mlp(_norm_before(first, self.norm2, x)))

    def forward(self, x: torch.Tensor, mask_matrix: torch.Tensor | None = None) -> torch.Tensor:
        """``(B, *S, C)`` to ``(B, *S, C)``. `mask_matrix` is upstream's argument and only passed on."""
        if self.use_checkpoint:
            x = x + self.drop_path(_checkpoint(self.forward_part1, x, mask_matrix))
            return x + _checkpoint(self.forward_part2, x)
        x = x + self.drop_path(self.forward_part1(x, mask_matrix))
        return x + self.forward_part2(x)

    def load_from(self, weights: Mapping[str, Mapping[str, torch.Tensor]], n_block: str, layer: str) -> None:
        """Copy block `n_block` of stage `layer` from the layout of the published weights (``module.``, ``fc1``)."""
        root = f"module.{layer}.0.blocks.{n_block}."
        with torch.no_grad():
            for name, value in self.state_dict(keep_vars=True).items():
                value.copy_(weights["state_dict"][root + name.replace("mlp.linear", "mlp.fc")])


class PatchMergingV2(nn.Module):
    """Half the extents, twice the channels: gather each 2-cell of tokens, norm, linear.

    The subclasses gather in different orders. A checkpoint holds for one of them only, though parameters have the
    same shapes in all.
    """

    offsets: ClassVar = {2: ((0, 0), (1, 0), (0, 1), (1, 1)), 3: tuple(itertools.product(range(2), repeat=3))}
    """For each spatial rank, the positions in a cell in the order in which their channels are concatenated."""

    def __init__(self, dim: int, norm_layer: type[nn.LayerNorm] = nn.LayerNorm, spatial_dims: int = 3) -> None:
        """
        Args:
            dim: channels ``C`` of the input.
            norm_layer: called with ``2^spatial_dims · dim``.
            spatial_dims: 2 or 3.
        """
        super().__init__()
        self.dim = dim
        self.reduction = nn.Linear(2**spatial_dims * dim, 2 * dim, bias=False)
        self.norm = norm_layer(2**spatial_dims * dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, *S, C)`` to ``(B, *⌈S/2⌉, 2C)``; an odd axis is zero-padded at its end."""
        extents = x.shape[1:-1]
        if len(extents) not in self.offsets:
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}; accepted is (B, H, W, C) or (B, D, H, W, C)"
            )
        if any(extent % 2 for extent in extents):
            x = F.pad(x, [0, 0, *itertools.chain.from_iterable((0, extent % 2) for extent in reversed(extents))])
        cells = [x[(slice(None), *(slice(o, None, 2) for o in cell))] for cell in self.offsets[len(extents)]]
        x = torch.cat(cells, dim=-1)  # (B, *⌈S/2⌉, 2^rank · C)
        return self.reduction(_norm_before(self.reduction, self.norm, x))  # (B, *⌈S/2⌉, 2C)


class PatchMerging(PatchMergingV2):
    """MONAI's ``"merging"`` since 1.5.0."""

    offsets: ClassVar = PatchMergingV2.offsets | {
        3: ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))
    }


class PatchMergingLegacy(PatchMergingV2):
    """MONAI's ``"merging"`` of 0.9 to 1.4, which the published Swin UNETR weights were trained with.

    In 3D two positions are gathered twice, and (1, 1, 0) and (0, 1, 1) are left out.
    """

    offsets: ClassVar = PatchMergingV2.offsets | {
        3: ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))
    }


MERGING_MODES = {"merging": PatchMerging, "mergingv2": PatchMergingV2, "merging_legacy": PatchMergingLegacy}
"""What the names accepted as `downsample` mean."""


class BasicLayer(nn.Module):
    """One stage: blocks whose windows alternate between unshifted and shifted, then patch merging."""

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        window_size: Sequence[int],
        drop_path: float | Sequence[float] = 0.0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        norm_layer: type[nn.LayerNorm] = nn.LayerNorm,
        downsample: type[nn.Module] | None = None,
        use_checkpoint: bool = False,
    ) -> None:
        """
        Args:
            dim: channels ``C``, a multiple of `num_heads`.
            depth: number of blocks.
            num_heads: attention heads.
            window_size: nominal window, one extent per spatial axis; odd blocks shift by half of it.
            drop_path: stochastic depth, one for all blocks or one per block.
            mlp_ratio: hidden channels of the MLP over `dim`.
            qkv_bias: whether the projection to queries, keys and values has a bias.
            drop: dropout of projections and MLP.
            attn_drop: dropout of attention weights.
            norm_layer: called with a number of channels.
            downsample: called with ``dim=, norm_layer=, spatial_dims=``; None ends at the blocks.
            use_checkpoint: compute blocks again in the backward instead of keeping what they computed.
        """
        super().__init__()
        self.window_size = window_size
        self.shift_size = tuple(w // 2 for w in window_size)
        self.no_shift = (0,) * len(window_size)
        self.depth = depth
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(
                dim=dim,
                num_heads=num_heads,
                window_size=window_size,
                shift_size=self.shift_size if i % 2 else self.no_shift,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                drop=drop,
                attn_drop=attn_drop,
                drop_path=drop_path[i] if isinstance(drop_path, Sequence) else drop_path,
                norm_layer=norm_layer,
                use_checkpoint=use_checkpoint,
            )
            for i in range(depth)
        )
        self.downsample: nn.Module | None = None
        if downsample is not None:
            self.downsample = downsample(dim=dim, norm_layer=norm_layer, spatial_dims=len(window_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, *S)`` to ``(B, 2C, *⌈S/2⌉)``, or to ``(B, C, *S)`` without `downsample`.

        The output is channels last in memory; a channels-last input is not copied.
        """
        x = self.run_blocks(x.movedim(1, -1).contiguous())  # (B, *S, C)
        if self.downsample is not None:
            x = self.downsample(x)  # (B, *⌈S/2⌉, 2C)
        return x.movedim(-1, 1)  # (B, 2C, *⌈S/2⌉)

    def run_blocks(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, *S, C)`` through all blocks, to the same shape."""
        for block in self.blocks:
            x = block(x)
        return x


class SwinTransformer(nn.Module):
    """Patch embedding and four stages; the features before each stage and after the last."""

    def __init__(
        self,
        patch_embed: nn.Module,
        stages: Sequence[nn.Module],
        residual_blocks: Sequence[nn.Module] | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        """
        Args:
            patch_embed: from the image to ``(B, C, *S)``.
            stages: four stages that are called as `BasicLayer` is.
            residual_blocks: four convolution blocks, one before each stage (SwinUNETR-V2), or None.
            drop_rate: dropout after the patch embedding.
        """
        super().__init__()
        self.use_v2 = residual_blocks is not None
        self.patch_embed = patch_embed
        self.pos_drop = nn.Dropout(drop_rate)
        # Upstream wraps every stage in a list of one; the state dict keys show it.
        self.layers1, self.layers2, self.layers3, self.layers4 = (nn.ModuleList([stage]) for stage in stages)
        if residual_blocks is not None:
            self.layers1c, self.layers2c, self.layers3c, self.layers4c = (nn.ModuleList([b]) for b in residual_blocks)

    def proj_out(self, x: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Features ``(B, C, *S)`` as handed to the decoder: under `normalize`, a non-affine norm over ``C``."""
        if not normalize:
            return x
        return autocast_layer_norm(x.movedim(1, -1)).movedim(-1, 1)

    def forward(self, x: torch.Tensor, normalize: bool = True) -> list[torch.Tensor]:
        """Five feature maps, finest first: ``(B, 2^i · C, *⌈S/2^i⌉)`` with `i` from 0 to 4.

        Args:
            x: image ``(B, channels, *extents)``.
            normalize: norm each returned map over its channels.
        """
        if x.shape[0] == 0:  # upstream raises too, without naming the cause
            raise RuntimeError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}; accepted is a batch of at least 1"
            )
        if not computes_in_float32(self, x):
            return self._features(x, normalize)
        with torch.autocast("cpu", enabled=False):
            features = self._features(x.float(), normalize)
        return [f.to(torch.bfloat16) for f in features]

    def _features(self, x: torch.Tensor, normalize: bool) -> list[torch.Tensor]:
        x = self.pos_drop(self.patch_embed(x))  # (B, C, *S)
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)  # same shape, channels last in memory from here on
        features = [self.proj_out(x, normalize)]
        for i in range(1, 5):
            if self.use_v2:
                x = getattr(self, f"layers{i}c")[0](x.contiguous())
            stage = getattr(self, f"layers{i}")[0]
            x = stage(x if isinstance(stage, BasicLayer) else x.contiguous())
            features.append(self.proj_out(x, normalize))
        return features

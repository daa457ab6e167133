"""The convolution blocks of Swin UNETR in channels-last memory, their norms fused with what follows.

Each class here brings a ``forward`` and declares the parts that it takes from its namesake in MONAI (`UnetResBlock`,
`UnetrUpBlock`, `UnetOutBlock`). Inherit from it first and from MONAI's class second: what it cannot run (a norm with
parameters, a device or dtype without kernels) then goes to MONAI's ``forward``.
"""

from __future__ import annotations

import numbers
from typing import Any, TypeGuard

import torch
import torch.nn as nn

from .cpu_bfloat16 import in_float32
from .ops._checks import autocast_is_on
from .ops._operator import has_kernel, is_transformed
from .ops.convolution import convolution
from .ops.instance_norm_act import instance_norm_act
from .plain import is_plain, is_untouched

LEAST_VOXELS = 4096
"""Volumes from this size on (16³) go to the operator `convolution`. In smaller ones most of the data is weights,
and PyTorch's convolution, which does not transform them, is faster."""


class ResidualBlock(nn.Module):
    """Two 3×3×3 convolutions with instance norms and LeakyReLU, and a residual before the last activation.

    `conv3` and `norm3` exist only where the residual changes channels. With other norms MONAI's ``forward`` runs.
    """

    conv1: nn.Sequential
    norm1: nn.InstanceNorm2d | nn.InstanceNorm3d
    lrelu: nn.Module
    conv2: nn.Sequential
    norm2: nn.InstanceNorm2d | nn.InstanceNorm3d
    conv3: nn.Sequential
    norm3: nn.InstanceNorm2d | nn.InstanceNorm3d

    @in_float32
    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        """``(B, C1, *S)``, and `skip` ``(B, C2, *S)``, to ``(B, C_out, *S)``; channels last where it runs fused."""
        if not self.runs_fused(x):
            return super().forward(_joined(x, skip))
        x, skip = channels_last(x), None if skip is None else channels_last(skip)
        if skip is not None and _computed_by_operator(self.conv1, x, skip) is None:
            # Joined once, for both convolutions of it.
            x, skip = _joined(x, skip), None
        slope = _slope(self.lrelu)
        out = _norm_act(self.conv1, self.norm1, _convolve(self.conv1, x, skip), slope)
        if slope is None:
            out = self.lrelu(_writable(out))
        out = _convolve(self.conv2, out)
        residual = _convolve(self.conv3, x, skip) if hasattr(self, "conv3") else _joined(x, skip)
        out = _norm_act(self.conv2, self.norm2, out, slope, residual, normalize_residual=hasattr(self, "norm3"))
        return out if slope is not None else self.lrelu(_writable(out))

    def runs_fused(self, x: torch.Tensor) -> bool:
        """Whether the norms are what `instance_norm_act` computes and a kernel computes it for `x`."""
        norms = [getattr(self, name) for name in ("norm1", "norm2", "norm3") if hasattr(self, name)]
        return (
            has_kernel("instance_norm_act", device=x.device.type, dtype=_computed_dtype(x))
            and all(_is_plain_instance_norm(norm) for norm in norms)
            and all(norm.eps == norms[0].eps for norm in norms)
        )


class UpBlock(nn.Module):
    """A transposed convolution, and a block on its output and the skip connection."""

    transp_conv: nn.Module
    conv_block: Any  # where it is no `ResidualBlock`, MONAI's ``forward`` runs

    @in_float32
    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """``(B, C_in, *S)`` and ``(B, C_out, *2S)`` to ``(B, C_out, *2S)``."""
        block = self.conv_block
        if not isinstance(block, ResidualBlock) or not block.runs_fused(x) or not is_untouched(block):
            return super().forward(x, skip)
        return block(self.transp_conv(channels_last(x)), skip)


class OutBlock(nn.Module):
    """A 1×1×1 convolution to the classes."""

    @in_float32
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, *S)`` to ``(B, classes, *S)``, contiguous whatever the memory of `x`."""
        return super().forward(x).contiguous()


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """`x` ``(B, C, *S)`` with its channels adjacent in memory; not copied if they are already."""
    rows = x.movedim(1, -1).contiguous()  # (B, *S, C)
    # By way of one axis, so that axes of extent 1 get the strides by which PyTorch recognises channels last.
    return rows.view(-1).view(rows.shape).movedim(-1, 1)


def _joined(x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    """`x` with the channels of `skip` after its own."""
    if skip is None:
        return x
    rows = x.movedim(1, -1), skip.movedim(1, -1)  # (B, *S, C1), (B, *S, C2)
    if not x.is_cuda or not all(r.is_contiguous() for r in rows):
        return torch.cat([x, skip], 1)
    # As matrices: on GPUs PyTorch's fast copies take up to four axes; tensors of five are copied element by element.
    joined = torch.cat([r.flatten(0, -2) for r in rows], 1)  # (B · prod(S), C1 + C2)
    return joined.view(*rows[0].shape[:-1], -1).movedim(-1, 1)


def _computed_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that convolutions of `x` return."""
    if autocast_is_on(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _is_plain_instance_norm(norm: nn.Module) -> bool:
    """Whether `norm` is a plain instance norm without parameters or running statistics.

    Those that were added to it later count too, whatever its options say.
    """
    return (
        is_plain(norm, nn.InstanceNorm2d, nn.InstanceNorm3d)
        and not norm.track_running_stats
        and isinstance(norm.eps, numbers.Real)
        and not any(part is not None for part in (*norm._parameters.values(), *norm._buffers.values()))
    )


def _slope(activation: nn.Module) -> float | None:
    """The slope below 0 of a LeakyReLU; None for any other activation, which then runs as a layer."""
    if not is_plain(activation, nn.LeakyReLU) or not isinstance(activation.negative_slope, numbers.Real):
        return None
    return activation.negative_slope if activation.negative_slope >= 0 else None


def _writable(out: torch.Tensor) -> torch.Tensor:
    """`out` of `instance_norm_act` for a layer that may work in place: a copy if the backward needs `out` as it is."""
    return out.clone() if torch.is_grad_enabled() and out.requires_grad else out


def _convolve(module: nn.Sequential, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
    """MONAI's `Convolution` of `x` and `skip`; by the operator `convolution` where that is the same and faster."""
    if (conv := _computed_by_operator(module, x, skip)) is not None:
        return convolution(x, conv.weight, None if skip is None else skip.to(x.dtype))
    return module(_joined(x, skip))


def _computed_by_operator(module: nn.Sequential, x: torch.Tensor, skip: torch.Tensor | None) -> nn.Conv3d | None:
    """The convolution in `module` if the operator `convolution` computes the same as `module`, by a kernel of ours."""
    conv, dtype = getattr(module, "conv", None), _computed_dtype(x)
    if (
        x[0, 0].numel() >= LEAST_VOXELS
        and _is_plain_convolution(conv, module)
        and (conv.weight.dtype == x.dtype == dtype or autocast_is_on(x.device))
        and has_kernel(
            "convolution",
            device=x.device.type,
            dtype=dtype,
            window=conv.kernel_size,
            channels=_channels(conv, x, skip),
        )
    ):
        return conv
    return None


def _channels(conv: nn.Conv3d, x: torch.Tensor, skip: torch.Tensor | None) -> tuple[int, int, int]:
    """`ConvolutionCall.channels` of `conv`."""
    if skip is None:
        first = conv.in_channels
    elif x.shape[1] == conv.in_channels // 2:  # as in `UpBlock`; torch.compile may have a symbol for the extent of x
        first = conv.in_channels // 2
    else:
        first = x.shape[1]
    return first, conv.in_channels - first, conv.out_channels


def _is_plain_convolution(conv: nn.Module | None, module: nn.Sequential) -> TypeGuard[nn.Conv3d]:
    """Whether `module` is only `conv`, and one that the operator computes: 3D, stride 1, extents kept, no bias."""
    return (
        _is_convolution_alone(module)
        and type(conv) is nn.Conv3d
        and conv.kernel_size in ((1, 1, 1), (3, 3, 3))
        and conv.padding == tuple(k // 2 for k in conv.kernel_size)
        and conv.padding_mode == "zeros"
        and conv.stride == conv.dilation == (1, 1, 1)
        and conv.groups == 1
        and conv.bias is None
    )


def _is_convolution_alone(module: nn.Module) -> bool:
    """Whether `module` is a sequence of one convolution, both plain: nothing else then uses its output."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and is_untouched(module)
        and len(module) == 1
        and is_plain(module[0], nn.Conv2d, nn.Conv3d)
    )


def _norm_act(
    module: nn.Module,
    norm: nn.InstanceNorm2d | nn.InstanceNorm3d,
    x: torch.Tensor,
    slope: float | None,
    residual: torch.Tensor | None = None,
    normalize_residual: bool = False,
) -> torch.Tensor:
    """`instance_norm_act` of `x`, which `module` returned: in place if nothing else uses `x`."""
    recorded = torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad))
    inplace = not recorded and not is_transformed() and _is_convolution_alone(module)
    return instance_norm_act(
        x,
        None if residual is None else residual.to(x.dtype),
        normalize_residual=normalize_residual,
        eps=norm.eps,
        negative_slope=1.0 if slope is None else slope,
        inplace=inplace,
    )

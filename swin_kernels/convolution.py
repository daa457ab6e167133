"""The convolution blocks of Swin UNETR in channels-last memory, their norms fused with what follows.

Each class here has the parts of its namesake in MONAI (`UnetResBlock`, `UnetrUpBlock`, `UnetOutBlock`) and only brings
a ``forward``. It is inherited from first and MONAI's class second, so that what it cannot run (a norm with parameters,
a device or dtype without kernels) goes to MONAI's ``forward``.
"""

from __future__ import annotations

import torch
import torch.nn as nn

from .backends import Call, load, select
from .ops.instance_norm_act import instance_norm_act


class ResidualBlock:
    """Two 3×3×3 convolutions with instance norms and LeakyReLU, and a residual before the last activation.

    Parts: ``conv1, norm1, lrelu, conv2, norm2``, and where the residual changes channels ``conv3, norm3``.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C_in, *S)`` to ``(B, C_out, *S)``, channels last in memory where it runs fused."""
        if not self.runs_fused(x):
            return super().forward(x)
        x = channels_last(x)
        slope = _slope(self.lrelu)
        out = _convolution_norm_act(self.conv1, self.norm1, x, slope)
        if slope is None:
            out = self.lrelu(out)
        if hasattr(self, "conv3"):
            out = _convolution_norm_act(self.conv2, self.norm2, out, slope, self.conv3(x), normalize_residual=True)
        else:
            out = _convolution_norm_act(self.conv2, self.norm2, out, slope, x)
        return out if slope is not None else self.lrelu(out)

    def runs_fused(self, x: torch.Tensor) -> bool:
        """Whether the norms are what `instance_norm_act` computes and a kernel computes it for `x`."""
        norms = [getattr(self, name) for name in ("norm1", "norm2", "norm3") if hasattr(self, name)]
        return (
            has_kernel(x.device.type, _computed_dtype(x))
            and all(_is_plain_instance_norm(norm) for norm in norms)
            and all(norm.eps == self.norm2.eps for norm in norms)
        )


class UpBlock:
    """A transposed convolution, and a block on its output beside the skip connection.

    Parts: ``transp_conv, conv_block``.
    """

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """``(B, C_in, *S)`` and ``(B, C_out, *2S)`` to ``(B, C_out, *2S)``."""
        if isinstance(self.conv_block, ResidualBlock) and self.conv_block.runs_fused(x):
            x, skip = channels_last(x), channels_last(skip)
        return super().forward(x, skip)


class OutBlock:
    """A 1×1×1 convolution to the classes, as a matrix product: channels-last features, contiguous logits.

    Parts: ``conv``.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, *S)`` to ``(B, classes, *S)``, contiguous."""
        return super().forward(x).contiguous()


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """`x` ``(B, C, *S)``, its channels adjacent in memory; not copied if they are."""
    rows = x.movedim(1, -1).contiguous()  # (B, *S, C)
    # Through one axis, so that axes of extent 1 get the strides that PyTorch takes for channels last.
    return rows.view(-1).view(rows.shape).movedim(-1, 1)


@torch.compiler.assume_constant_result
def has_kernel(device: str, dtype: torch.dtype) -> bool:
    """Whether `instance_norm_act` has a kernel here, beside the reference."""
    return select(Call("instance_norm_act", device, dtype, head_dim=0, window=())) is not load("reference")


def _computed_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that convolutions of `x` return."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _is_plain_instance_norm(norm: nn.Module) -> bool:
    """Whether `norm` is an instance norm without parameters, running statistics or hooks."""
    plain = type(norm) in (nn.InstanceNorm2d, nn.InstanceNorm3d)
    return plain and not norm.affine and not norm.track_running_stats and not _has_hooks(norm)


def _slope(activation: nn.Module) -> float | None:
    """The slope below 0 of a LeakyReLU; None for any other activation, which then runs by itself."""
    if type(activation) is nn.LeakyReLU and activation.negative_slope >= 0 and not _has_hooks(activation):
        return activation.negative_slope
    return None


def _convolution_norm_act(
    convolution: nn.Module,
    norm: nn.Module,
    x: torch.Tensor,
    slope: float | None,
    residual: torch.Tensor | None = None,
    normalize_residual: bool = False,
) -> torch.Tensor:
    """`convolution`, then `instance_norm_act` of what it returns: in place if that serves nobody else."""
    out = convolution(x)
    recorded = torch.is_grad_enabled() and (out.requires_grad or (residual is not None and residual.requires_grad))
    return instance_norm_act(
        out,
        None if residual is None else residual.to(out.dtype),
        normalize_residual=normalize_residual,
        eps=norm.eps,
        negative_slope=1.0 if slope is None else slope,
        inplace=not recorded and not any(_has_hooks(module) for module in convolution.modules()),
    )
